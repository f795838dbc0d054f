"""The examples as a user runs them, and whether they can fail; what they compute is proved elsewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.detector


@pytest.fixture(scope="module")
def detector() -> ModuleType:
    """examples/text_detector.py as a module."""
    spec = importlib.util.spec_from_file_location("text_detector", EXAMPLES / "text_detector.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


@pytest.fixture(scope="module")
def sites(detector):
    return detector.Graph(detector.detector()).sites()


def test_sites_of_the_detector(sites):
    seen = [(s.merge, tuple(factor for _, factor in s.sources), s.merged_is_read_again, s.filters.shape) for s in sites]
    pyramid, joint = (24, 96, 3, 3), (24, 4 * 24, 3, 3)
    assert seen == [
        ("add", (1, 1), True, pyramid),
        ("add", (1, 2), True, pyramid),
        ("add", (1, 2), True, pyramid),
        ("add", (1, 2), False, pyramid),
        ("concat", (8, 4, 2, 1), False, joint),
    ]
    assert [(s.bias is not None, s.activation) for s in sites] == [(False, None)] * 4 + [(True, "relu")]


@pytest.mark.parametrize("photograph", ["page", "text"])
def test_every_site_agrees_with_onnxruntime(detector, capsys, photograph):
    assert detector.main([photograph, "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^add_conv, return_sum ", out, re.MULTILINE)) == 3
    assert len(re.findall(r"^(add|concat)_conv  ", out, re.MULTILINE)) == 2
    assert int(re.search(r"finds (\d+) regions", out)[1]) > 0  # the network saw text: its activations are real ones


def test_wrong_filters_are_noticed(detector, sites, monkeypatch):
    """One transposed filter bank, taps r and s exchanged, is far outside the bound."""
    swapped = [replace(site, filters=np.ascontiguousarray(site.filters.swapaxes(2, 3))) for site in sites[:1]]
    monkeypatch.setattr(detector.Graph, "sites", lambda self: swapped)
    assert detector.main(["text", "--rounds", "1"]) == 1


def test_unknown_photograph_is_refused(detector, capsys):
    with pytest.raises(SystemExit, match="2"):
        detector.main(["cat"])
    assert "choose from page, text" in capsys.readouterr().err
