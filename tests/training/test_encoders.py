from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fibopolicy.encoders import Encoder, build_encoder
from fibopolicy.encoders.vit import ViT
from fibopolicy.errors import UserError
from fibopolicy.policies import Policy, PolicyConfig, Shapes, build_policy
from fibopolicy.policies.run_directory import load_policy
from fibopolicy.training import ComputeConfig, TrainConfig
from fibopolicy.training.checkpoint import save_weights
from fibopolicy.training.encoders import (
    camera_encoders,
    checkpoint_gradients,
    freeze,
    load_encoder_weights,
    training_mode,
)
from fibopolicy.training.trainer import train
from fibopolicy.utils.imports import make_torchvision_importable

SHAPES = Shapes({"front_image": (24, 24), "wrist_image": (24, 24)}, {"hand": 3}, 4)
TINY_ENCODER: Any = {"patch_size": 6, "width": 24, "depth": 3, "num_heads": 2, "keypoints": 4}


def policy_of(config: TrainConfig, seed: int, **changes: Any) -> Policy:
    torch.manual_seed(seed)
    return build_policy(replace(config.policy, **changes), SHAPES)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


# --- freezing


@pytest.mark.filterwarnings("ignore:the frozen encoder has random weights")
def test_a_frozen_encoder_does_not_change_while_the_policy_learns(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    for name, frozen in (("trained", False), ("frozen", True)):
        train(
            replace(tiny_config, out=tmp_path / name, freeze_encoder=frozen, checkpoint_every=100)
        )
    shapes = load_policy(tmp_path / "frozen").policy.shapes
    torch.manual_seed(tiny_config.seed)
    fresh = build_policy(tiny_config.policy, shapes).state_dict()
    for name, frozen in (("trained", False), ("frozen", True)):
        for weights in ("model", "ema"):
            found = load_file(tmp_path / name / f"{weights}.safetensors")
            moved = {key for key, tensor in found.items() if not torch.equal(tensor, fresh[key])}
            assert any(key.startswith("mlp.") for key in moved)
            assert any(".encoders." in key for key in moved) != frozen


def test_batch_norm_of_a_frozen_encoder_keeps_its_statistics() -> None:
    policy = build_policy(
        PolicyConfig(encoder="resnet18", hidden=8), Shapes({"front_image": (40, 40)}, {}, 4)
    )
    freeze(policy)
    training_mode(policy)
    assert policy.training
    assert not any(
        module.training for module in next(iter(camera_encoders(policy).values())).modules()
    )
    before = {
        name: tensor.clone() for name, tensor in policy.state_dict().items() if "running" in name
    }
    batch = {
        "obs": {"front_image": torch.randint(0, 255, (2, 1, 40, 40, 3), dtype=torch.uint8)},
        "actions": torch.zeros(2, 8, 4),
        "action_mask": torch.ones(2, 8, dtype=torch.bool),
    }
    policy.loss(batch)[0].backward()
    assert before
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in before.items())
    assert all((p.grad is None) == (".encoders." in name) for name, p in policy.named_parameters())


# --- weights


def test_encoders_start_from_a_run_camera_by_camera(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    train(replace(tiny_config, out=tmp_path / "first"))
    theirs = camera_encoders(load_policy(tmp_path / "first").policy)
    done = train(
        replace(
            tiny_config,
            out=tmp_path / "second",
            encoder_weights=tmp_path / "first",
            freeze_encoder=True,
            seed=3,
        )
    )
    ours = camera_encoders(done.policy)
    assert ours.keys() == theirs.keys() == {"workspace_image", "wrist_image"}
    assert all(same(ours[camera], theirs[camera]) for camera in ours)
    assert not same(ours["workspace_image"], ours["wrist_image"])
    shutil.rmtree(tmp_path / "first")  # a resumed run has its own
    train(
        replace(
            tiny_config,
            out=tmp_path / "second",
            encoder_weights=tmp_path / "first",
            freeze_encoder=True,
            seed=3,
        ),
        resume=True,
    )


def test_encoder_weights_of_other_cameras_are_rejected(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    train(replace(tiny_config, out=tmp_path / "run"))
    with pytest.raises(
        UserError, match="run: has encoders for workspace_image, wrist_image, none for front_image"
    ):
        load_encoder_weights(policy_of(tiny_config, 0), tmp_path / "run")
    train(replace(tiny_config, out=tmp_path / "one", cameras=("wrist_image",)))
    policy = policy_of(tiny_config, 0)
    load_encoder_weights(policy, tmp_path / "one")
    encoders = camera_encoders(policy)
    assert same(encoders["front_image"], encoders["wrist_image"])


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_encoders_start_from_a_weights_file(
    tiny_config: TrainConfig, tmp_path: Path, suffix: str, prefix: str
) -> None:
    source = camera_encoders(policy_of(tiny_config, 1))["front_image"].state_dict()
    path = tmp_path / f"weights{suffix}"
    saved = {f"{prefix}{name}": tensor for name, tensor in source.items()}
    (
        save_file(saved, path)
        if suffix == ".safetensors"
        else torch.save({"state_dict": saved, "epoch": 3}, path)
    )
    policy = policy_of(tiny_config, 2)
    load_encoder_weights(policy, path)
    for encoder in camera_encoders(policy).values():
        assert all(
            torch.equal(encoder.state_dict()[name], tensor) for name, tensor in source.items()
        )


def test_incompatible_weights_are_named(tiny_config: TrainConfig, tmp_path: Path) -> None:
    source = dict(camera_encoders(policy_of(tiny_config, 1))["front_image"].state_dict())
    source["norm.weights"] = source.pop("norm.weight")
    source["cls"] = torch.zeros(1, 1, 7)
    path = tmp_path / "weights.safetensors"
    save_file(source, path)
    expected = (
        r"weights\.safetensors: .*missing: norm\.weight; unknown: norm\.weights; shape: cls 1x1x7"
        r" where 1x1x24 is expected"
    )
    with pytest.raises(UserError, match=expected):
        train(replace(tiny_config, out=tmp_path / "run", encoder_weights=path))
    assert not (tmp_path / "run").exists()


def test_unreadable_weights_are_rejected_and_run_no_code(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.mkdir, (tmp_path / "executed",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    (tmp_path / "empty").mkdir()
    messages = {
        "evil.pth": "cannot be read as weights",
        "broken.safetensors": "cannot be read as weights",
        "other.pth": "holds no mapping from names to tensors",
        "nowhere.pth": "no such file or run directory",
        "empty": "is not a run directory",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=f"{name}: .*{message}") as caught:
            load_encoder_weights(policy_of(tiny_config, 0), tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_timm_checkpoint_loses_its_classifier_and_resizes_its_positions(tmp_path: Path) -> None:
    make_torchvision_importable()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    config = PolicyConfig(
        encoder="timm:vit_tiny_patch16_224", encoder_options={"attention": "fibottention"}, hidden=8
    )
    policy = build_policy(config, Shapes({"front_image": (32, 48)}, {}, 4))
    encoder = camera_encoders(policy)["front_image"]
    encoder.model.blocks = encoder.model.blocks[:1]
    load_encoder_weights(policy, tmp_path / "timm.safetensors")
    loaded: dict[str, Tensor] = encoder.model.state_dict()
    assert torch.equal(
        loaded["blocks.0.attn.qkv.weight"], model.state_dict()["blocks.0.attn.qkv.weight"]
    )
    assert torch.equal(loaded["pos_embed"][:, 0], model.state_dict()["pos_embed"][:, 0])
    assert loaded["pos_embed"].shape == (1, 1 + 2 * 3, 192)
    assert not torch.equal(loaded["pos_embed"], torch.zeros_like(loaded["pos_embed"]))
    save_file(
        {name: t for name, t in model.state_dict().items() if name != "norm.bias"},
        tmp_path / "timm.safetensors",
    )
    with pytest.raises(UserError, match=r"missing: model\.norm\.bias\)"):
        load_encoder_weights(policy, tmp_path / "timm.safetensors")


def test_positions_without_a_class_token_are_resampled(tmp_path: Path) -> None:
    make_torchvision_importable()
    timm = pytest.importorskip("timm")
    # CaiT adds its class token after the positions.
    weights = timm.create_model("cait_xxs24_224", img_size=64).state_dict()
    torch.save(weights, tmp_path / "cait.pth")
    policy = build_policy(
        PolicyConfig(encoder="timm:cait_xxs24_224", hidden=8),
        Shapes({"front_image": (32, 32)}, {}, 4),
    )
    load_encoder_weights(policy, tmp_path / "cait.pth")
    loaded = camera_encoders(policy)["front_image"].model.pos_embed
    middle = weights["pos_embed"].mean(1)
    assert loaded.shape == (1, 4, 192)
    torch.testing.assert_close(loaded.mean(1), middle, atol=0.01, rtol=0)


# --- gradient checkpointing


def kept_bytes(encoder: nn.Module, images: Tensor) -> tuple[int, list[Tensor]]:
    """What a forward pass keeps for backward, except weights, and the gradients."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    encoder.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        feature = encoder(images)[1]
    feature.square().sum().backward()
    return sum(kept.values()), [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


@pytest.mark.parametrize("attention", ["dense", "fibottention"])
def test_gradient_checkpointing_stores_less_and_gives_the_same_gradients(attention: Any) -> None:
    torch.manual_seed(0)
    encoder = ViT(image_size=(24, 24), attention=attention, **TINY_ENCODER)
    images = torch.rand(4, 3, 24, 24)
    before, expected = kept_bytes(encoder, images)
    encoder.checkpoint_gradients()
    after, found = kept_bytes(encoder, images)
    assert after < 0.35 * before
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_run_with_gradient_checkpointing_ends_with_the_same_weights(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    for name, on in (("kept", False), ("recomputed", True)):
        train(
            replace(
                tiny_config, out=tmp_path / name, compute=ComputeConfig(gradient_checkpointing=on)
            )
        )
    one, other = (
        (tmp_path / name / "ema.safetensors").read_bytes() for name in ("kept", "recomputed")
    )
    assert one == other


def test_encoders_that_cannot_checkpoint_are_refused() -> None:
    policy = build_policy(
        PolicyConfig(encoder="resnet18", hidden=8), Shapes({"front_image": (40, 40)}, {}, 4)
    )
    with pytest.raises(UserError, match="ResNet18 does not support gradient checkpointing"):
        checkpoint_gradients(policy)


def test_timm_checkpoints_gradients_itself() -> None:
    make_torchvision_importable()
    pytest.importorskip("timm")
    encoder = build_encoder("timm:vit_tiny_patch16_224", image_size=(32, 32))
    encoder.checkpoint_gradients()
    assert encoder.model.grad_checkpointing


# --- compilation


@pytest.mark.parametrize(
    ("attention", "checkpointed"),
    [("dense", False), ("fibottention", False), ("fibottention", True)],
)
def test_the_vision_transformer_compiles_into_one_graph_with_the_kernel_inside(
    attention: Any, checkpointed: bool
) -> None:
    torch.compiler.reset()  # shapes that were compiled before would count as dynamic
    encoder = ViT(image_size=(24, 24), attention=attention, **{**TINY_ENCODER, "depth": 1})
    if checkpointed:
        encoder.checkpoint_gradients()
    images, graphs = torch.rand(2, 3, 24, 24), []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    found = torch.compile(encoder, backend=keep, fullgraph=True)(images)[1]
    torch.testing.assert_close(found, encoder(images)[1])
    calls = [
        str(node.target)
        for part in graphs[0].modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
    ]
    assert len(graphs) == 1
    assert any("sparse_attention" in call for call in calls) == (attention == "fibottention")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_run_with_compiled_encoders_has_the_same_losses_and_names(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    # As little as there is to compile: each kernel costs seconds.
    encoder = replace(
        tiny_config.policy, encoder_options={**TINY_ENCODER, "depth": 1, "pool": "mean"}
    )
    config = replace(tiny_config, cameras=("wrist_image",), policy=encoder)
    for name, on in (("eager", False), ("compiled", True)):
        train(replace(config, out=tmp_path / name, compute=ComputeConfig(compile=on)))
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").open()]
        for n in ("eager", "compiled")
    ]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert load_policy(tmp_path / "compiled").step == 12


def test_a_missing_compiler_is_named(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError,
        match="--compile needs a C\\+\\+ compiler on a CPU and found no no-such-compiler; install",
    ):
        train(replace(tiny_config, out=tmp_path / "run", compute=ComputeConfig(compile=True)))
    assert not (tmp_path / "run").exists()


def test_every_encoder_of_a_policy_is_found(tiny_config: TrainConfig) -> None:
    for views in ("separate", "shared", "joint"):
        found = camera_encoders(policy_of(tiny_config, 0, views=views))
        assert found.keys() == SHAPES.images.keys()
        assert all(isinstance(encoder, Encoder) for encoder in found.values())
        assert len({id(encoder) for encoder in found.values()}) == (2 if views == "separate" else 1)


def test_a_run_with_published_weights_is_loaded_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_torchvision_importable()
    timm = pytest.importorskip("timm")
    config = PolicyConfig(encoder="timm:resnet10t", encoder_options={"pretrained": True})
    shapes = Shapes({"front_image": (32, 32)}, {"hand": 3}, 4)
    document = {
        "policy": asdict(config),
        "shapes": asdict(shapes),
        "train": {"optimizer": {"steps": 1}},
        "env_args": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(document))
    policy = build_policy(replace(config, encoder_options={}), shapes)
    save_weights(tmp_path / "ema.safetensors", policy, {"step": "1"})
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda *args, pretrained, **rest: _fail_if_downloading(pretrained) or create(*args, **rest),
    )
    assert load_policy(tmp_path).step == 1
    with pytest.raises(
        UserError, match="timm:resnet10t: its published weights cannot be downloaded"
    ):
        build_policy(config, shapes)


def _fail_if_downloading(pretrained: bool) -> None:
    if pretrained:
        raise OSError("no network")
