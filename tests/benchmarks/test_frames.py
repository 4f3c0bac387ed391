# SPDX-License-Identifier: Apache-2.0
"""Whole-frame benchmark: peers give vosops' probabilities, every stage is timed, the file says where."""

import json

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from benchmarks import frame_models, frames
from benchmarks.frame_models import FrameCase, random_model
from benchmarks.peers.aot_frame import PublishedAOT, matrices
from vosops.models import SessionSettings, create
from vosops.models.aot import AOT

# More objects than a pass takes are two groups.
AOT_CASES = {
    "aott": FrameCase("aott", (65, 97), 12, 1),
    "aotl": FrameCase("aotl", (65, 97), 2, 3),
    "r50_deaotl": FrameCase("r50_deaotl", (65, 97), 2, 3),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = {
        "stcn": FrameCase("stcn", (60, 90), 2, 3),
        "xmem": FrameCase("xmem", (60, 90), 2, 4, 50),
        "stm": FrameCase("stm", (60, 90), 1, 2),
        **AOT_CASES,
    }
    monkeypatch.setattr(frames, "CASES", cases)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["stcn", "xmem"])
def test_peers_agree_and_all_stages_are_timed(name):
    rows = frames.measure_case(name, repeats=1)
    assert [row["implementation"] for row in rows] == ["vosops", "eager_read", "published"]
    assert rows[0]["positions"] == {"stcn": 3 * 24, "xmem": 50 + 4 * 24}[name]
    for row in rows:
        assert all(row[f"{stage}_ms"] > 0 for stage in ("encode", "read", "decode", "memorise"))
        assert row["error"] < 1e-4
        assert 0 < row["read_share"] < 1
    assert frames.table(rows).row_count == 3


@pytest.mark.parametrize("name", AOT_CASES)
def test_peers_of_aot_agree_and_all_stages_are_timed(name):
    rows = frames.measure_case(name, repeats=1)
    assert [row["implementation"] for row in rows] == ["vosops", "published", "published_sdpa"]
    assert rows[0]["positions"] == AOT_CASES[name].frames * 35
    for row in rows:
        assert all(row[f"{stage}_ms"] > 0 for stage in ("encode", "propagate", "decode", "memorise"))
        assert row["error"] < 1e-4
        assert 0 < row["propagate_share"] < 1
    assert (rows[0]["append_ms"] > 0) == (name != "aott")
    assert frames.table(rows).row_count == 3


@pytest.mark.parametrize(
    ("name", "objects", "sdpa"),
    [("aotl", 12, False), ("aots", 3, True), ("r50_deaotl", 3, False), ("deaots", 12, True)],
)
@torch.no_grad()
def test_published_engine_on_a_clip(name, objects, sdpa):
    """Both engines from the same reference frame on, each on its own predictions."""
    model = random_model(name)
    session, peer = model.open_session(SessionSettings(memory_every=2)), PublishedAOT(model, sdpa=sdpa)
    frame = torch.randn(1, 3, 65, 97)
    labels = torch.randint(0, objects + 1, (1, 5, 7)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    labels = labels[:, :65, :97]
    given = torch.nn.functional.one_hot(labels, 1 + objects).permute(0, 3, 1, 2).float()
    ids = list(range(1, objects + 1))
    session.remember(0, frame, session.encode(frame), given, ids, given=True)
    peer.refer(peer.encode(frame), labels, objects)
    for t in range(1, 6):
        frame = frame + 0.3 * torch.randn_like(frame)
        features, maps = session.encode(frame), peer.encode(frame)
        ours, theirs = session.segment(features), peer.segment(maps)
        assert theirs.shape == (1, 1 + objects, 65, 97)
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
        session.remember(t, frame, features, ours, ids, given=False)
        peer.remember(maps, ours.argmax(1))
        if t % 2 == 0:
            peer.append()
    assert peer.groups[0].long[0][0].shape[0] == 3 * 35  # 0, 2, 4
    # The memories count: without the last two frames the result is another.
    for group in peer.groups:
        group.long = [tuple(x[-35:] for x in parts) for parts in group.long]
    assert (peer.segment(maps) - theirs).abs().amax() > 1e-3


def test_published_engine_refuses_what_it_does_not_run():
    peer = PublishedAOT(create("aott").eval())
    with pytest.raises(
        ValueError, match=r"image must have a size of the network such as \(65, 97\), got \(64"
    ):
        peer.encode(torch.zeros(1, 3, 64, 97))
    with pytest.raises(ValueError, match="blocks of version 1"):
        PublishedAOT(AOT(block=2))


def test_matrices_of_a_1080p_frame():
    """The table of sizes that AOT's published code stores: 21.7 GB of scores at 68 x 121 and 10 frames."""
    sizes = matrices(create("aott"), (68, 121), 10)
    assert sizes["scores"] == sizes["weights"] == 4 * 8 * 8228 * 82280
    assert sizes["padded"] == 4 * 8 * 8228 * 82 * 135
    assert sizes["dense"] == 4 * 8 * 8228**2


def test_a_peer_with_other_numbers_is_not_timed(monkeypatch):
    def silent(model, read, features):
        return torch.full((1, 3, 64, 96), torch.nan)

    monkeypatch.setattr(frame_models.stcn_frame, "stcn_decode", silent)
    with pytest.raises(RuntimeError, match="stcn: published differs from vosops by nan"):
        frames.measure_case("stcn", repeats=1)


def test_command_writes_a_file_whose_other_cases_stay(tmp_path):
    app = Typer()
    app.command()(frames.main)
    target = tmp_path / "frames.json"
    other = {"case": "other", "implementation": "vosops", "frame_ms": 1.0}
    old = {"environment": {"date": "then", "revision": "old"}, "rows": [other], "peak": [other], "note": "n"}
    target.write_text(json.dumps(old))
    for _ in range(2):
        result = CliRunner().invoke(app, ["--case", "stm", "--repeats", "1", "--json", str(target)])
        assert result.exit_code == 0, result.output
        record = json.loads(target.read_text())
        assert [(row["case"], row["implementation"]) for row in record["rows"]] == [
            ("other", "vosops"),
            ("stm", "vosops"),
        ]
        assert record["rows"][0] == {**other, "date": "then", "revision": "old"}
        assert record["rows"][1]["date"] == record["environment"]["date"]
        assert record["environment"]["torch"] == torch.__version__
        assert (record["peak"][0]["case"], record["note"]) == ("other", "n")
    assert CliRunner().invoke(app, ["--case", "none"]).exit_code == 2


def test_peak_of_a_frame():
    row = frames.measure_peak("aotl")
    assert row["frame_peak_bytes"] > row["memory_bytes"] > 4 * 35 * 3 * 3 * 512
    assert row["published_matrices_bytes"]["scores"] == 4 * 8 * 35 * 3 * 35
