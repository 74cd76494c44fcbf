"""Inputs for modules with the signatures of libraries that need not be here: denoisers, graphs, pairs of images."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from permgraph import auto_spec, verify
from permgraph.capture import capture
from permgraph.capture.inputs.layers import for_unread
from permgraph.capture.passes import Variation
from permgraph.capture.record import Limits
from permgraph.capture.run import capture_again
from permgraph.errors import NoInputsError


class Configured(nn.Module):
    """A module with a config, as those of diffusers have."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**settings)


class TokenDenoiser(Configured):
    """Tokens of an image and of a text in one row, with the places of both, and a vector of the whole text."""

    def __init__(self, guided: bool) -> None:
        super().__init__(
            in_channels=6,
            joint_attention_dim=14,
            pooled_projection_dim=10,
            axes_dims_rope=(2, 4, 4),
            guidance_embeds=guided,
        )
        self.x, self.text, self.pooled, self.time = (
            nn.Linear(6, 20),
            nn.Linear(14, 20),
            nn.Linear(10, 20),
            nn.Linear(1, 20),
        )
        self.guide = nn.Linear(1, 20) if guided else None
        self.last = nn.Linear(20, 6)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        pooled_projections: Any = None,
        timestep: Any = None,
        img_ids: Any = None,
        txt_ids: Any = None,
        guidance: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        step = self.time((timestep / 1000)[:, None].to(hidden_states.dtype)) + self.pooled(pooled_projections)
        if self.guide is not None:
            step = step + self.guide(guidance[:, None])
        places = torch.cat((txt_ids, img_ids), 0).sum(-1)
        row = torch.cat([self.text(encoder_hidden_states), self.x(hidden_states)], 1) * places.cos()[None, :, None]
        return self.last((row + step[:, None]).relu())[:, encoder_hidden_states.shape[1] :]


class ClipDenoiser(Configured):
    """Frames before channels, and an embedding of places for just so many of them."""

    def __init__(self) -> None:
        super().__init__(
            in_channels=4,
            text_embed_dim=12,
            sample_height=6,
            sample_width=8,
            sample_frames=9,
            temporal_compression_ratio=4,
        )
        self.patch, self.text_proj = nn.Conv2d(4, 20, 2, 2), nn.Linear(12, 20)
        self.places = nn.Parameter(torch.randn(3 * 3 * 4, 20))
        self.last = nn.Linear(20, 4)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        batch, frames, channels, height, width = hidden_states.shape
        x = self.patch(hidden_states.reshape(-1, channels, height, width)).flatten(2).transpose(1, 2)
        x = x.reshape(batch, frames * x.shape[1], -1) + self.places
        return self.last(torch.cat([self.text_proj(encoder_hidden_states), x], 1).relu() + timestep[:, None, None])


class Steered(Configured):
    """A network for control: what is denoised, and a picture that is drawn twice as finely."""

    def __init__(self) -> None:
        super().__init__(
            in_channels=4,
            cross_attention_dim=12,
            conditioning_channels=3,
            conditioning_embedding_out_channels=(8, 16),
            sample_size=None,
        )
        self.x, self.picture, self.text = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(12, 16)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
    ) -> Tensor:
        text = self.text(encoder_hidden_states).mean(1)[:, :, None, None]
        return (self.x(sample) + conditioning_scale * self.picture(controlnet_cond)).relu() + text * timestep[
            :, None, None, None
        ]


class WithSizes(Configured):
    """A network that takes a whole text and the sizes of the image in a dictionary."""

    def __init__(self) -> None:
        super().__init__(
            in_channels=4,
            cross_attention_dim=12,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=34,
            sample_size=16,
        )
        self.x, self.text, self.added = nn.Conv2d(4, 16, 3, padding=1), nn.Linear(12, 16), nn.Linear(34, 16)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        assert added_cond_kwargs is not None
        sizes = added_cond_kwargs["time_ids"].repeat_interleave(4, 1)
        more = self.added(torch.cat([added_cond_kwargs["text_embeds"], sizes], 1)) + self.text(
            encoder_hidden_states
        ).mean(1)
        return self.x(sample).relu() * more[:, :, None, None] + timestep[:, None, None, None]


@pytest.mark.parametrize(
    "model",
    [TokenDenoiser(False), TokenDenoiser(True), ClipDenoiser(), Steered(), WithSizes()],
    ids=["tokens", "guided", "clips", "steered", "sizes"],
)
def test_denoisers(model: nn.Module) -> None:
    captured = capture(model)
    assert captured.inputs.finder == "denoisers"
    assert captured.unused == ()


def test_a_clip_has_the_frames_that_the_config_says() -> None:
    assert capture(ClipDenoiser()).inputs.kwargs["hidden_states"].shape == (2, 3, 4, 6, 8)


def test_images_that_are_concatenated_share_the_channels() -> None:
    class Registration(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

        def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
            return self.last(self.first(torch.cat([moving, fixed], 1)).relu())

    moving, fixed = capture(Registration()).inputs.args
    assert moving.shape[1] == fixed.shape[1] == 1


def test_channels_are_not_taken_for_samples() -> None:
    class Labelled(nn.Module):
        """Of as many channels as there are samples in a batch: a single sample would do, and mean another thing."""

        def __init__(self) -> None:
            super().__init__()
            self.x, self.labels, self.norm = (
                nn.Conv2d(2, 8, 3, padding=1),
                nn.Conv2d(3, 8, 3, padding=1),
                nn.GroupNorm(2, 8),
            )

        def forward(self, x: Tensor, seg: Tensor) -> Tensor:
            labels = nn.functional.interpolate(seg, size=x.shape[2:])
            return self.norm(self.x(x)) * self.labels(labels)

    x, seg = capture(Labelled()).inputs.args
    assert (x.ndim, x.shape[1], seg.ndim, seg.shape[1]) == (4, 2, 4, 3)


def test_a_mask_of_each_place() -> None:
    class Inpainting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, img: Tensor, mask: Tensor) -> Tensor:
            return self.last(self.first(torch.cat([img * mask, mask.to(img.dtype)], 1)).relu())

    img, mask = capture(Inpainting()).inputs.args
    assert img.shape[1] == 3
    assert mask.shape == (img.shape[0], 1, *img.shape[2:])


class Layers(nn.Module):
    """Layers that look at a context, if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        assert context is not None, "context must be passed in"
        return self.own(x).relu() + self.other(context).mean(1, keepdim=True)


def test_an_argument_that_is_handed_on_to_a_part() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.layers = nn.Embedding(30, 12), Layers()

        def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            return self.layers(self.tokens(x), **kwargs)

    inputs = capture(Wrapper()).inputs
    assert inputs.kwargs["context"].shape[-1] == 12


class Messages(nn.Module):
    """Sums over the edges of a graph, with what the edges have, pooled for each graph of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes, self.of_edges, self.last = nn.Linear(12, 16), nn.Linear(5, 16), nn.Linear(16, 3)
        self.edge_dim = 5

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor) -> Tensor:
        h = self.nodes(x)
        sent = (h[edge_index[0]] + self.of_edges(edge_attr)).relu()
        h = torch.zeros_like(h).index_add(0, edge_index[1], sent)
        return self.last(torch.zeros(2, 16, dtype=h.dtype).index_add(0, batch, h))


def test_a_graph_with_features_of_its_edges() -> None:
    captured = capture(Messages())
    x, edges, attributes, batch = (captured.inputs.kwargs[name] for name in ("x", "edge_index", "edge_attr", "batch"))
    assert captured.inputs.finder == "graphs"
    assert x.shape[1] == 12 and attributes.shape == (edges.shape[1], 5) and batch.shape == x.shape[:1]
    assert set(edges[0].tolist()) == set(range(len(x)))  # no node is without an edge


def test_a_graph_of_as_many_nodes_as_the_model_has() -> None:
    class Rows(nn.Module):
        """A row of weights for each node."""

        def __init__(self) -> None:
            super().__init__()
            self.num_nodes = 11
            self.weight, self.last = nn.Parameter(torch.randn(11, 8)), nn.Linear(8, 3)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            sums = torch.zeros(self.num_nodes, 8, dtype=x.dtype).index_add(0, edge_index[1], self.weight[edge_index[0]])
            return self.last(sums + x)

    assert capture(Rows()).inputs.kwargs["x"].shape == (11, 8)


def test_a_text_of_just_so_many_tokens_beside_an_image() -> None:
    class Contrastive(nn.Module):
        """Two towers, either of which runs alone; the text's mask is as large as its context."""

        def __init__(self) -> None:
            super().__init__()
            self.context_length = 21
            self.visual = nn.Sequential(
                nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)
            )
            self.layers = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 14), nn.ReLU())
            self.words, self.last = nn.Embedding(50, 10), nn.Linear(14, 6)  # the table comes after what is made of it
            self.places = nn.Parameter(torch.randn(21, 10))

        def forward(self, image: Any = None, text: Any = None) -> Any:
            seen = self.visual(image) if image is not None else None
            if text is None:
                return seen, None
            return seen, self.last(self.layers(self.words(text) + self.places).mean(1))

    spec = auto_spec(Contrastive())
    assert sorted(group.size for group in spec.moving.values()) == [8, 10, 12, 14]
    assert spec.passes[0].inputs == "(image=float32[2, 3, 32, 32], text=int64[2, 21])"
    assert verify(Contrastive(), spec).without_influence == ()  # as if it were compared on an image alone


def test_a_text_that_no_pass_has_read_is_tried_as_ids_first() -> None:
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(w, w + 1), nn.LayerNorm(w + 1)) for w in range(5, 12)])
    model = nn.ModuleDict({"layers": layers, "words": nn.Embedding(50, 5)})
    unread = {name for name, _ in model.named_parameters()}
    assert next(for_unread(model, "anything", unread)).dtype == torch.int64


def test_a_graph_whose_edges_are_beyond_its_nodes_ends_no_process() -> None:
    """A further pass has fewer rows than its edges number; a product of such sparse matrices would crash torch."""

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            nodes = x.shape[0]
            counts = torch.bincount(edge_index[0], minlength=nodes)
            rows = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            columns = edge_index[1][edge_index[0].argsort(stable=True)]
            adjacency = torch.sparse_csr_tensor(rows, columns, torch.ones(len(columns)), size=(nodes, nodes))
            paths = (adjacency @ adjacency).to_dense()
            return self.last(paths.to(x.dtype) @ self.first(x).relu())

    ring = torch.stack([torch.arange(50), (torch.arange(50) + 1) % 50])
    captured = capture(Squared(), (torch.randn(50, 6), ring))
    beyond = torch.stack([torch.arange(7), torch.arange(7) * 7])
    fewer = replace(captured.inputs, args=(torch.randn(7, 6), beyond))
    variation = Variation("too few nodes", frozenset({"sizes"}), fewer)
    with pytest.raises(RuntimeError, match="col_indices"):
        capture_again(Squared(), captured, variation, Limits(1000, None, 0.0))


def test_a_list_that_the_annotation_tells() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv3d(3, 8, 2, 2), nn.Linear(8, 4)

        def forward(self, volumes: list[Tensor]) -> Tensor:
            if not isinstance(volumes, list) or any(volume.ndim != 4 for volume in volumes):
                raise ValueError("volumes come in a list")
            return torch.stack([self.last(self.first(volume[None]).mean((2, 3, 4))[0]) for volume in volumes])

    (volumes,) = capture(Bags()).inputs.args
    assert isinstance(volumes, list) and all(volume.shape[0] == 3 for volume in volumes)


def test_a_shape_with_nothing_in_it_ends_no_search() -> None:
    """Too few frames leave none, and the shape that is then wanted has a zero."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            frames = x.shape[1] // 1000
            return self.last(x.reshape(x.shape[0], frames, 4)) + y

    with pytest.raises(NoInputsError):
        capture(Folded())


class MadeWith(nn.Module):
    """A layer whose `__new__` wants what its constructor wants."""

    def __new__(cls, width: int) -> MadeWith:
        assert width
        return super().__new__(cls)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_a_module_that_is_made_with_arguments() -> None:
    assert capture(nn.Sequential(MadeWith(5), nn.Linear(5, 2))).unused == ()


def test_what_a_model_does_not_have_is_asked_for_once() -> None:
    """A `NotImplementedError` of the model's own is no reason to run it on real tensors."""

    class Absent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.real = 0

        def forward(self, x: Tensor) -> Tensor:
            runs.append(type(x))
            raise NotImplementedError("nothing without tiles")

    runs: list[type] = []
    with pytest.raises(NoInputsError, match="nothing without tiles"):
        capture(Absent())
    assert runs and Tensor not in runs


def test_nothing_found_is_said_in_seconds() -> None:
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(20)], nn.Conv2d(3, 8, 1))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            result = self.layers(x)
            raise ValueError(f"never content with {tuple(result.shape)} and {tuple(y.shape)}")

    capture(nn.Linear(2, 2))  # so that nothing is loaded while the time is taken
    started = time.process_time()
    with pytest.raises(NoInputsError):
        capture(Refuses())
    assert time.process_time() - started < 8
