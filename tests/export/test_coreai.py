"""Core AI bundles, executed by Apple's own runtime on this machine. Long checks: to record a graph of free lengths
takes half a minute."""

import json

import pytest

from export import ExportFault, MissingPackage, Options, bundle, coreai
from export.trained import load
from tests.export.checkpoint_of import save_checkpoint

here = pytest.mark.skipif(not coreai.find_spec("coreai_torch"), reason="coreai-torch is not installed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return load(save_checkpoint(tmp_path_factory.mktemp("runs") / "tiny", chats=True))


@here
@pytest.mark.campaign
def test_apples_runtime_computes_what_the_checkpoint_does(trained, tmp_path):
    """Windows, two bases, chunks longer than a window, caches longer than the text."""
    report = bundle.export(trained, "coreai", Options(dtype="float32"), tmp_path / "out")
    assert report["parity"]["runtime"]["max_abs"] <= 1e-4 and len(report["parity"]["chunks"]) > 3
    about = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert about["assets"] == {"main": "tiny.aimodel"} and (tmp_path / "out" / "tiny.aimodel").exists()
    assert about["language"]["states"] == {"keyCache": "kv_cache", "valueCache": "kv_cache"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / "tokenizer" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@here
@pytest.mark.campaign
def test_another_window_is_caught(trained, tmp_path):
    asset = tmp_path / "m.aimodel"
    coreai.convert(trained.model, trained.never).save_asset(asset)
    trained.model.blocks[0].attention.window += 1
    try:
        with pytest.raises(ExportFault, match="Apple's runtime computes something else than the checkpoint"):
            coreai.check(asset, trained, trained.model)
    finally:
        trained.model.blocks[0].attention.window -= 1


def test_without_the_package(trained, monkeypatch):
    monkeypatch.setattr(coreai, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="the package coreai-torch is not installed: pip install coreai-torch"):
        coreai.problems(trained, Options())
