from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from command import call
from demo_files import ENV_ARGS, write
from hub_server import Hub, serving, use_hub

from fibopolicy.datasets import HOSTED, DemoFile, download, import_demos, split
from fibopolicy.datasets.download import names_of
from fibopolicy.errors import UserError

FILE = "datasets/robomimic/robomimic_datasets/v1.5/lift/ph/low_dim_v15.hdf5"
LIFT = "robomimic/lift/ph"


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of robomimic's hosted layout: states and vectors, no images; 1 MB."""
    path = tmp_path_factory.mktemp("hosted") / "low_dim_v15.hdf5"
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = 8
        data.attrs["env_args"] = json.dumps(ENV_ARGS)
        for index in range(2):
            demo = data.create_group(f"demo_{index}")
            demo.attrs["num_samples"] = 4
            demo.attrs["model_file"], demo.attrs["ep_meta"] = "<mujoco/>", "{}"
            demo["actions"] = random.uniform(-1, 1, (4, 7))
            demo["states"] = random.normal(size=(4, 16000))
            demo["obs/robot0_eef_pos"] = random.normal(size=(4, 3))
    return path.read_bytes()


@pytest.fixture
def hub(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        use_hub(hub.url, tmp_path / "cache", monkeypatch)
        monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's attempts
        hub.files[FILE] = content
        yield hub


def test_a_hosted_file_is_downloaded_and_labelled(hub: Hub, content: bytes, tmp_path: Path) -> None:
    path = download(LIFT, tmp_path / "lift.hdf5")
    with DemoFile(path) as file:
        assert len(file.demos) == 2
    with h5py.File(path) as file:
        attrs = dict(file["data"].attrs)
    assert attrs["licence"] == "MIT"
    assert attrs["origin"] == "human"
    assert attrs["source"] == "v1.5/lift/ph/low_dim_v15.hdf5 of robomimic/robomimic_datasets"
    assert attrs["source_revision"] == hub.commit("datasets/robomimic/robomimic_datasets")
    assert attrs["download_sha256"] == hashlib.sha256(content).hexdigest()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["lift.hdf5"]


def test_a_second_download_transfers_nothing(hub: Hub, tmp_path: Path) -> None:
    path = download(LIFT)
    assert path == tmp_path / "cache/fibopolicy/datasets/robomimic_lift_ph_low_dim.hdf5"
    assert len(hub.sent) == 1
    assert download(LIFT) == path
    assert len(hub.sent) == 1


def test_a_file_made_from_a_download_is_not_taken_for_it(hub: Hub, tmp_path: Path) -> None:
    path, made = download(LIFT), tmp_path / "made.hdf5"
    split(path, made, 0.5)
    with pytest.raises(UserError, match="exists already"):
        download(LIFT, made)
    import_demos(path, made, overwrite=True)
    with pytest.raises(UserError, match="exists already"):
        download(LIFT, made)


def test_size_and_licence_are_shown_then_the_contents_and_the_next_command(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    caplog.set_level("INFO", "fibopolicy")
    hub.files[FILE.replace("low_dim", "demo")] = hub.files.pop(FILE)
    line = ["download", LIFT, "--type", "demo", "--out", str(tmp_path / "lift.hdf5")]
    code, out, err = call(monkeypatch, capsys, *line)
    assert code == 0, err
    assert "demo_v15.hdf5 of robomimic/robomimic_datasets, 1.0 MB, licence MIT" in caplog.text
    assert re.search(r"^demos +2$", out, re.MULTILINE)
    assert f"next    fibopolicy render {tmp_path}/lift.hdf5 --out lift_ph_images.hdf5" in out


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_drops_halfway_is_resumed(
    hub: Hub, content: bytes, tmp_path: Path, reset: bool
) -> None:
    hub.drops, hub.reset = [400_000, 300_000], reset
    path = download(LIFT, tmp_path / "lift.hdf5")
    with h5py.File(path, "r") as file:
        assert file["data"].attrs["download_sha256"] == hashlib.sha256(content).hexdigest()
    (_, first), *later = hub.sent
    assert first is None
    assert len(later) == 2
    assert all(span is not None for _, span in later)


def test_a_server_that_ignores_ranges_is_read_from_the_start(
    hub: Hub, content: bytes, tmp_path: Path
) -> None:
    hub.drops, hub.ranges = [400_000], False
    with h5py.File(download(LIFT, tmp_path / "lift.hdf5"), "r") as file:
        assert file["data"].attrs["download_sha256"] == hashlib.sha256(content).hexdigest()


def test_a_killed_download_is_resumed_where_it_stopped(
    hub: Hub, content: bytes, tmp_path: Path
) -> None:
    hub.drops = [500_000] + [0] * 50
    with pytest.raises(UserError, match=r"broke after .* of 1.0 MB .* run this again to resume"):
        download(LIFT, tmp_path / "lift.hdf5")
    assert not (tmp_path / "lift.hdf5").exists()
    (kept,) = tmp_path.glob("*.incomplete")
    done = kept.stat().st_size
    assert done > 0
    hub.drops = []
    hub.requests.clear()
    download(LIFT, tmp_path / "lift.hdf5")
    assert [span for _, span in hub.sent] == [f"bytes={done}-"]
    assert not list(tmp_path.glob("*.incomplete"))


def test_an_interrupted_download_of_an_older_version_is_not_continued(
    hub: Hub, content: bytes, tmp_path: Path
) -> None:
    hub.drops = [500_000] + [0] * 50
    with pytest.raises(UserError, match="run this again to resume"):
        download(LIFT, tmp_path / "lift.hdf5")
    hub.drops = []
    hub.files[FILE] = content + b"\0"
    download(LIFT, tmp_path / "lift.hdf5")
    assert hub.sent[-1] == (f"/cdn/{FILE}", None)
    assert not list(tmp_path.glob("*.incomplete"))


def test_a_file_other_than_announced_is_refused_with_both_values(
    hub: Hub, content: bytes, tmp_path: Path
) -> None:
    sha256 = hashlib.sha256(content).hexdigest()
    hub.announced[FILE] = ("0" * 64, len(content))
    with pytest.raises(UserError, match=f"came with sha256 {sha256}, expected {'0' * 64}"):
        download(LIFT, tmp_path / "lift.hdf5")
    hub.announced[FILE] = (sha256, len(content) + 1)
    with pytest.raises(UserError, match=f"size {len(content)}, expected {len(content) + 1}"):
        download(LIFT, tmp_path / "lift.hdf5")
    assert [item.name for item in tmp_path.iterdir()] == []


def test_a_file_that_changed_on_the_hub_is_refused_with_both_values(
    hub: Hub, content: bytes, tmp_path: Path
) -> None:
    path = download(LIFT, tmp_path / "lift.hdf5")
    hub.files[FILE] = content + b"\0"
    old, new = (hashlib.sha256(one).hexdigest() for one in (content, content + b"\0"))
    with pytest.raises(UserError, match=f"with sha256 {old}, but .* has {new} now"):
        download(LIFT, path)
    download(LIFT, path, overwrite=True)
    with h5py.File(path, "r") as file:
        assert file["data"].attrs["download_sha256"] == new


def test_another_file_is_replaced_only_with_overwrite(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine.hdf5").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists already"):
        download(LIFT, tmp_path / "mine.hdf5")
    assert (tmp_path / "mine.hdf5").read_bytes() == b"mine"
    download(LIFT, tmp_path / "mine.hdf5", overwrite=True)
    assert h5py.is_hdf5(tmp_path / "mine.hdf5")


def test_without_network_one_line_says_where_to_put_the_file(
    hub: Hub, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    with pytest.raises(UserError) as caught:
        download(LIFT)
    line = str(caught.value)
    assert "127.0.0.1:9 cannot be reached" in line
    url = "http://127.0.0.1:9/datasets/robomimic/robomimic_datasets/resolve/main/v1.5/lift/ph"
    place = tmp_path / "cache/fibopolicy/datasets/robomimic_lift_ph_low_dim.hdf5"
    assert f"get {url}/low_dim_v15.hdf5 by other means, save it as {place}" in line
    assert "\n" not in line
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    assert download(LIFT) == place
    with h5py.File(place, "r") as file:
        assert file["data"].attrs["licence"] == "MIT"


def test_a_file_brought_by_hand_is_verified_once_there_is_a_network(
    hub: Hub, content: bytes, tmp_path: Path
) -> None:
    place = HOSTED[LIFT].default_path()
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    assert download(LIFT) == place
    assert hub.sent == []
    place.write_bytes(content[:-1])
    with pytest.raises(UserError, match="exists already"):
        download(LIFT)


def test_a_file_in_the_hub_s_cache_is_used_with_and_without_network(
    hub: Hub, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    repository = "robomimic/robomimic_datasets"
    hf_hub_download(repository, FILE.partition("robomimic_datasets/")[2], repo_type="dataset")
    hub.requests.clear()
    download(LIFT, tmp_path / "one.hdf5")
    assert hub.sent == []
    use_hub("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    assert h5py.is_hdf5(download(LIFT, tmp_path / "two.hdf5"))


def test_the_token_goes_to_the_hub_and_not_to_the_server_of_the_content(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(LIFT, tmp_path / "lift.hdf5")
    tokens = [(path, token) for (_, path, _), token in zip(hub.requests, hub.tokens, strict=True)]
    assert all(
        token == (None if path.startswith("/cdn/") else "Bearer hf_secret")
        for path, token in tokens
    )


def test_a_full_disk_leaves_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UserError, match=r"needs 1.0 MB, and its disk has 0.0 MB free"):
            download(LIFT, tmp_path / "lift.hdf5")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        with pytest.raises(UserError, match=r"lift.hdf5: cannot be written: File too large"):
            download(LIFT, tmp_path / "lift.hdf5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_what_the_next_one_resumes(hub: Hub, tmp_path: Path) -> None:
    hub.stall = 600_000
    env = {**os.environ, "HF_ENDPOINT": hub.url, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code = f"from fibopolicy.datasets import download; download({LIFT!r}, 'lift.hdf5')"
    running = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env)
    assert hub.stalled.wait(60)
    (kept,) = tmp_path.glob("lift*.incomplete")
    while not kept.stat().st_size:
        pass
    running.kill()
    running.wait()
    done, hub.stall = kept.stat().st_size, None
    download(LIFT, tmp_path / "lift.hdf5")
    assert hub.sent[-1][1] == f"bytes={done}-"
    assert sorted(tmp_path.glob("lift*")) == [tmp_path / "lift.hdf5"]


def test_what_is_no_hdf5_file_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files[FILE] = b"<html>log in</html>"
    with pytest.raises(UserError, match="is not an HDF5 file"):
        download(LIFT, tmp_path / "lift.hdf5")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_hub_does_not_have_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can/ph/low_dim_v15.hdf5 does not exist, or you may not"):
        download("robomimic/can/ph", tmp_path / "can.hdf5")


def test_a_non_commercial_licence_must_be_accepted(hub: Hub, content: bytes) -> None:
    name = "mimicgen/core/coffee_d0"
    hub.files["datasets/amandlek/mimicgen_datasets/core/coffee_d0.hdf5"] = content
    with pytest.raises(UserError, match=r"CC BY-NC-SA 4.0 forbids commercial use; pass --accept"):
        download(name)
    assert hub.requests == []
    with h5py.File(download(name, accept_licence=True), "r") as file:
        assert file["data"].attrs["licence"] == "CC BY-NC-SA 4.0"


def test_a_set_is_downloaded_into_a_folder(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write(tmp_path / "small.hdf5").read_bytes()
    for number in (1, 2):
        hub.files[f"datasets/amandlek/mimicgen_datasets/object/mug_cleanup_o{number}.hdf5"] = small
    line = ["download", "mimicgen/object", "--out", str(tmp_path / "mugs"), "--accept-licence"]
    code, out, err = call(monkeypatch, capsys, *line)
    assert code == 0, err
    assert [path.name for path in sorted((tmp_path / "mugs").iterdir())] == [
        "mug_cleanup_o1.hdf5",
        "mug_cleanup_o2.hdf5",
    ]
    assert f"fibopolicy train --dataset {tmp_path}/mugs/mug_cleanup_o2.hdf5" in out
    assert [len(names_of(f"libero/{suite}")) for suite in ("goal", "90")] == [10, 90]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("robomimic/lift/hp", {}, "did you mean 'robomimic/lift/ph'"),
        ("libero/gaol", {}, "did you mean 'libero/goal'"),
        (LIFT, {"type": "lowdim"}, "did you mean 'low_dim'"),
        ("libero/goal/turn_on_the_stove", {"type": "demo"}, "has a single file, leave out --type"),
        ("lift-human", {"type": "demo"}, "has a single file, leave out --type"),
    ],
)
def test_wrong_names_and_types_get_a_suggestion(
    name: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        download(names_of(name)[0], **options)  # type: ignore[arg-type]


def test_the_table_agrees_with_robomimic_s_registry() -> None:
    robomimic = pytest.importorskip("robomimic")
    tasks = {
        f"robomimic/{task}/{kind}"
        for task, kinds in robomimic.DATASET_REGISTRY.items()
        for kind in kinds
    }
    assert tasks == {name for name in HOSTED if name.startswith("robomimic/")}


def test_everything_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, "download", "list")
    assert code == 0
    assert all(name in out for name in HOSTED)
    assert "robomimic/lift/ph      --type low_dim, demo" in out
    assert "lift-human" in out
