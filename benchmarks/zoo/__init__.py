"""Sweeps over whole libraries of models: is each captured, inferred and verified, given nothing but the model?

    python -m benchmarks.zoo sweep torchvision        # resumes where it stopped
    python -m benchmarks.zoo report                   # writes docs/coverage.md from what the sweeps recorded

Each model runs in a process of its own, with limits on time and memory, and leaves one line of JSON.
"""
