"""A sample of each zoo, measured as the sweeps measure, and the sweeps themselves."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import permgraph as pg
from benchmarks.zoo import report
from benchmarks.zoo.measure import measure
from benchmarks.zoo.names import ZOOS
from benchmarks.zoo.small import Shrink, agreed, backbones, filled, half_turned, looked_at_once, shrunk, smaller_images
from benchmarks.zoo.sweep import in_process, read, sweep, warm_up

torchvision = pytest.importorskip("torchvision")

SAMPLE = [
    ("torchvision", "squeezenet1_1"),
    ("torchvision", "shufflenet_v2_x0_5"),
    ("torchvision", "mobilenet_v3_small"),
    ("timm", "test_resnet"),
    ("timm", "test_vit"),
    ("timm", "test_convnext"),
    ("timm", "test_efficientnet"),
    ("timm", "test_nfnet"),
    ("transformers", "BertModel"),
    ("transformers", "T5Model"),
    ("transformers", "GptOssModel"),
    ("transformers", "FalconMambaModel"),
    ("transformers", "ConvNextV2Model"),
    ("transformers", "ViltModel"),
    ("transformers", "VoxtralRealtimeModel"),  # positions that are shifted copies of one another
    ("heads", "causal-lm/GPTBigCodeForCausalLM"),
    ("heads", "masked-lm/RoFormerForMaskedLM"),
    ("heads", "sequence-classification/OPTForSequenceClassification"),
]


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    warm_up()


@pytest.mark.parametrize(("zoo", "name"), SAMPLE, ids=lambda value: value)
def test_a_sample_is_verified(zoo: str, name: str) -> None:
    record = measure(zoo, name)
    assert record["status"] == "verified", record
    assert record["groups"] > 0
    assert record["unknown"] == {}


@pytest.mark.zoo
@pytest.mark.parametrize("zoo", list(ZOOS))
def test_nothing_in_a_zoo_is_wrong(zoo: str) -> None:
    pytest.importorskip(ZOOS[zoo].library)
    records = sweep(zoo)
    assert [name for name, record in records.items() if record["status"] in ("wrong", "not inferred")] == []


def test_a_crash_or_a_hang_is_a_record() -> None:
    assert in_process("torchvision", "resnet18", seconds=0.01)["status"] == "not captured"
    record = in_process("torchvision", "no such model")
    assert record["status"] == "not built"
    assert "no such model" in record["error"]


def test_a_model_that_is_stopped_has_come_as_far_as_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pg, "verify", lambda *args, **options: time.sleep(100))
    record = in_process("timm", "test_vit", seconds=20)
    assert record["status"] == "not verified"
    assert record["error"] == "stopped after 20 s"
    assert record["groups"] > 0


def test_sweeps_resume(tmp_path: Path) -> None:
    done = {"zoo": "timm", "name": "test_vit", "status": "wrong", "seconds": 1.0}
    cut_off = '{"zoo": "timm", "na'
    (tmp_path / "timm.jsonl").write_text(json.dumps(done) + "\n" + cut_off)
    assert sweep("timm", ["test_vit"], results=tmp_path) == {"test_vit": done}
    again = sweep("timm", ["test_vit"], again=["wrong"], controls="none", results=tmp_path)
    assert again["test_vit"]["status"] == "verified"
    assert read(tmp_path / "timm.jsonl") == again


def test_the_report_counts_and_lists(tmp_path: Path) -> None:
    common = {"zoo": "timm", "seconds": 1.0, "pins": {"padded with 3": 2}, "nodes": 7, "mode": "fake"}
    records = [
        {
            **common,
            "name": "good",
            "status": "verified",
            "groups": 3,
            "log_order": 9.5,
            "max_error": 1e-15,
            "controls": 5,
            "runs": [["the inputs", 1e-15], ["larger sizes in training mode", 1e-15], ["two calls", None]],
            "general": {
                "status": "wrong",
                "code": "",
                "structures": {"O": 2, "B^2": 1},
                "dimension": 77,
                "error": "no symmetry",
            },
        },
        {**common, "name": "bad", "status": "wrong", "groups": 3, "log_order": 9.5, "error": "an error of 1 | 2"},
        {**common, "name": "rigid", "status": "inferred", "groups": 0, "log_order": 0.0, "unknown": {"aten.odd": 2}},
        {"zoo": "timm", "seconds": 1.0, "name": "absent", "status": "not built", "error": f"No {Path.home()}/file"},
    ]
    (tmp_path / "timm.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = tmp_path / "coverage.md"
    report.write(tmp_path, page)
    text = page.read_text()
    assert f"| {ZOOS['timm'].title} | 4 | 3 | 3 | 3 | 2 | 1 | 0 | 1 | 0 | 1 |" in text
    assert f"| {ZOOS['timm'].title} | 1 | 1 | 1 | 0 | 0 | 0 |" in text, (
        "models that were run on other sizes and in training"
    )
    assert f"| {ZOOS['timm'].title} | 1 | 0 | 0 | 1 | 0 | 0 | 0 |" in text, (
        "one with general symmetries, which is wrong"
    )
    assert "| good | wrong | no symmetry |" in text
    assert "| wrong |  | 2 O, 1 B^2 | 77 |" in text
    assert "| bad | wrong | an error of 1 \\| 2 |" in text
    assert "| padded with n | 6 |" in text
    assert "| `aten.odd` | 1 | rigid |" in text
    assert str(Path.home()) not in text


def test_configurations_shrink_by_what_names_mean() -> None:
    config = {
        "hidden_size": 768, "num_attention_heads": 12, "head_dim": 64, "num_hidden_layers": 12, "vocab_size": 50000,
        "image_token_id": 49999, "image_size": 224, "layer_types": ["a", "a", "a", "b"] * 3,
        "rope_parameters": {"mrope_section": [16, 24, 24]}, "id2label": {0: "x"}, "num_experts": 64,
    }  # fmt: skip
    small = shrunk(config, Shrink(8, 2))
    assert small["hidden_size"] == 96 and small["head_dim"] == 8 and small["num_attention_heads"] == 12
    assert small["layer_types"] == ["a", "b"] and small["num_hidden_layers"] == 2
    assert 0 < small["image_token_id"] < small["vocab_size"] < 1000
    assert small["image_size"] == 224 and small["num_experts"] == 8
    assert small["rope_parameters"]["mrope_section"] == [2, 3, 3]
    assert config["hidden_size"] == 768


def test_heads_may_keep_their_size_and_widths_that_are_equal_shrink_alike() -> None:
    config = {
        "text_config": {
            "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "num_hidden_layers": 6, "intermediate_size": 14336, "layer_types": ["a", "b"] * 3,
            "mlp_layer_types": ["c"] * 5 + ["d"], "num_dense_layers": 3,
            "rope_parameters": {"mrope_section": [16, 24, 24]}, "moe_layers": [2, 4],
            "per_layer_config": {"01": {"num_attention_heads": 64, "head_dim": 64}, "02": {"head_dim": 99}},
        },
        "vision_config": {"d_model": 1024, "num_heads": 16, "depth": 24, "output_size": 4096},
        "projection_dim": 4096,
    }  # fmt: skip
    small = shrunk(config, Shrink(8, 2, 16, heads=True))
    text = small["text_config"]
    assert (text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]) == (512, 4, 2)
    assert text["head_dim"] == 128 and text["rope_parameters"]["mrope_section"] == [16, 24, 24]
    assert text["intermediate_size"] == 128
    assert small["projection_dim"] == 512 and small["vision_config"]["output_size"] == 512
    assert (small["vision_config"]["d_model"], small["vision_config"]["num_heads"]) == (128, 2)
    assert small["vision_config"]["depth"] == 2
    # One layer of each kind that the lists and the table tell apart: all six, since a list names the fifth.
    assert text["num_hidden_layers"] == 6 and text["layer_types"] == ["a", "b"] * 3
    assert text["num_dense_layers"] == 3 and text["moe_layers"] == [2, 4]
    assert text["per_layer_config"] == {"01": {"num_attention_heads": 8, "head_dim": 64}, "02": {"head_dim": 99}}


def test_what_a_configuration_leaves_to_its_checkpoint_is_filled_in() -> None:
    config = {
        "hidden_size": 1152, "num_attention_heads": 14, "num_hidden_layers": 3, "rope_parameters": {"rope_theta": 5.0},
        "mlp_layer_types": None, "attn_config": {"clip_qkv": None}, "tower_config": {"num_key_value_heads": 2},
        "text_config": {"rope_parameters": {}, "layer_types": ["near", "far", "near"]},
    }  # fmt: skip
    found = filled(config)
    assert found["num_attention_heads"] == 12, "the most that divide the width"
    assert found["num_key_value_heads"] == 14 and found["mlp_layer_types"] == ["dense", "sparse", "dense"]
    assert found["attn_config"] == {"clip_qkv": 100.0, "rope_theta": 5.0}
    assert found["text_config"]["rope_parameters"].keys() == {"near", "far"}
    turned = half_turned(config)
    assert turned is not None and turned["rope_parameters"] == {"rope_theta": 5.0, "partial_rotary_factor": 0.5}
    assert turned["head_dim"] == 128 and half_turned({"hidden_size": 8}) is None


def test_parts_of_a_model_agree() -> None:
    tower = {"hidden_size": 768, "num_hidden_layers": 9, "intermediate_size": 5632, "pixel_shuffle_ratio": 0.5}
    config = {
        "hidden_size": 1536, "vision_feature_layers": [-2, -8, 6], "text_config": {"hidden_size": 4096},
        "vision_config": {**tower, "projection_dim": 2048, "vision_output_dim": 7680, "projector_output_dim": 512},
    }  # fmt: skip
    same = agreed(config, None)
    assert same["hidden_size"] == same["vision_config"]["projection_dim"] == 4096
    assert same["vision_config"]["vision_output_dim"] == 512
    heard = agreed({"encoder_config": {"hidden_dim": 64}, "projector_config": {"encoder_hidden_size": 99}}, None)
    assert heard["projector_config"] == {"encoder_hidden_size": 64}
    nested = agreed({"thinker_config": {"text_config": {"hidden_size": 8}, "tower": {"out_hidden_size": 9}}}, None)
    assert nested["thinker_config"]["tower"] == {"out_hidden_size": 8}
    spoken = agreed({"decoder_config": {"vocab_size": 9}, "speech_config": {"vocab_size": 5}}, None)
    assert spoken["speech_config"] == {"vocab_size": 9}
    small = shrunk(same, Shrink(8, 2))
    assert small["vision_feature_layers"] == [-2, -2, 2]
    assert small["vision_config"]["intermediate_size"] == 4 * small["vision_config"]["hidden_size"]
    built = {"vision_config": {"architecture": "resnet18", "hidden_size": 512, "model_args": None}}
    assert shrunk(built, Shrink(8, 2)) == built, "what another library builds keeps its widths"
    given = [part["vision_config"]["model_args"] for part in backbones(built)]
    assert given[-3:] == [{"layers": (1, 1, 1, 1, 1)}, None, {"depth": 2, "embed_dim": 192}]
    assert backbones(config) == [config]


def test_large_images_become_small_ones_and_what_is_made_of_them_as_well() -> None:
    found = smaller_images(
        {
            "image_size": 1008,
            "vision_config": {"image_size": [1008, 1008], "patch_size": 14, "pretrain_image_size": 336},
            "backbone_feature_sizes": [[288, 288], [72, 72]],
            "hidden_size": 1008,
        }
    )
    assert found == {
        "image_size": 252,
        "vision_config": {"image_size": [252, 252], "patch_size": 14, "pretrain_image_size": 336},
        "backbone_feature_sizes": [[72, 72], [18, 18]],
        "hidden_size": 1008,
    }
    cut = smaller_images({"patch_size": 384, "image_model_config": {"image_size": 384, "patch_size": 14}})
    assert cut == {"patch_size": 96, "image_model_config": {"image_size": 96, "patch_size": 14}}
    assert smaller_images({"image_size": 224, "patch_size": 16}) is None
    assert smaller_images({"image_size": 518, "patch_size": 14}) is None  # 37 patches have no smaller grid


def test_a_schedule_of_depths_becomes_short_and_channels_by_stage_stay() -> None:
    small = shrunk(
        {
            "num_block_repeats": [1, 2, 3],
            "depth_coefficient": 3.1,
            "backbone_channel_list": [64, 32],
            "backbone_config": {"embed_dim_per_stage": [32, 64]},
        },
        Shrink(8, 2, 16, heads=True),
    )
    assert small["num_block_repeats"] == [1, 1, 1] and small["depth_coefficient"] == 1.0
    assert small["backbone_channel_list"] == [64, 32]


def test_a_backbone_that_keeps_its_widths_is_followed_by_what_reads_it() -> None:
    table = {"block_configs": [[[3, 96, 96, 1, True]], [[3, 96, 192, 2, False]]], "stage_out_channels": [96, 192]}
    config = {"backbone_config": table, "layer_list_out_channels": [192, 96], "neck_out_channels": 96}
    small = shrunk(config, Shrink(8, 2, heads=True))
    assert small["backbone_config"] == table and small["layer_list_out_channels"] == [192, 96]
    assert small["neck_out_channels"] == 12
    other = {"backbone_config": {"model_type": "timm_backbone"}, "encoder_in_channels": [192, 384]}
    assert shrunk(other, Shrink(8, 2, heads=True)) == other
    alone = shrunk({"stem_channels": [3, 32, 48], "encoder_in_channels": [192, 384]}, Shrink(8, 2, heads=True))
    assert alone == {"stem_channels": [3, 4, 6], "encoder_in_channels": [24, 48]}, "an image keeps its channels"


def test_features_are_taken_from_as_many_stages_as_before() -> None:
    config = {
        "num_hidden_layers": 24, "stage_names": ["stem", *(f"stage{i}" for i in range(1, 25))],
        "out_indices": [6, 12, 18, 24], "out_features": ["stage6", "stage12", "stage18", "stage24"],
        "num_queries": 300,
    }  # fmt: skip
    small = shrunk(config, Shrink(8, 4, heads=True))
    assert small["num_hidden_layers"] == 4
    assert small["out_indices"] == [1, 2, 3, 4] and small["out_features"] is None
    assert small["num_queries"] == 30
    late = shrunk({**config, "out_indices": [21, 22, 23, 24]}, Shrink(8, 5, heads=True))
    assert late["out_indices"] == [2, 3, 4, 5], "and they differ"
    assert looked_at_once({"num_cross_attention_heads": 8}) == {"num_cross_attention_heads": 1}
    assert looked_at_once({"num_attention_heads": 8}) is None
