"""A job's plan: read back by the job that made it, refused to any other; a dry run refuses what a run refuses."""

from pathlib import Path

import pytest
from support import write_tones

from megascale import storage
from megascale.errors import ConfigError, DataError, TokenError
from megascale.tokenize.codec import Codec
from megascale.tokenize.plan import (
    Plan,
    TokenizeConfig,
    describe_plan,
    find_codec,
    make_plan,
    publish_plan,
    read_plan,
)


@pytest.fixture
def audio(tmp_path) -> Path:
    write_tones(tmp_path / "audio", 4)
    return tmp_path / "audio"


def config(audio: Path, weights: str = "calibrate", bitrate_kbps: float = 1.5, clips: int = 2) -> TokenizeConfig:
    return TokenizeConfig.model_validate(
        {
            "source": {"kind": "files", "url": str(audio)},
            "codec": {"weights": weights, "bitrate_kbps": bitrate_kbps},
            "shards": {"clips": clips},
            "output": {"url": str(audio.parent / "out")},
        }
    )


def names(audio: Path) -> list[str]:
    return sorted(path.name for path in (audio.parent / "out").glob("*"))


def test_plan_is_read_back_as_published(audio):
    plan = make_plan(config(audio))
    assert read_plan(config(audio)) is None
    publish_plan(config(audio), plan)
    assert read_plan(config(audio)) == plan
    publish_plan(config(audio), Plan([], []))  # a second driver's
    assert read_plan(config(audio)) == plan


def test_cut_plan_is_refused_by_name(audio):
    publish_plan(config(audio), make_plan(config(audio)))
    where = audio.parent / "out" / "plan.json"
    whole = where.read_bytes()
    for text in [*(whole[:size] for size in range(0, len(whole), 101)), b"[]", b"{}", b'{"shards": [{}]}']:
        where.write_bytes(text)
        with pytest.raises(
            DataError, match=f"^{where}: broken: .*; delete it, and codec.safetensors beside it, and run"
        ):
            read_plan(config(audio))


def test_codec_without_a_plan_is_another_jobs(audio):
    where = audio.parent / "out" / "codec.safetensors"
    storage.publish_bytes(str(where), b"a codec")
    for refuse in (read_plan, describe_plan):
        with pytest.raises(ConfigError, match=f"^{where}: the codec of another job, for there is no plan.json beside"):
            refuse(config(audio))
    assert names(audio) == ["codec.safetensors"]


def test_stored_codec_with_too_few_codebooks_is_refused(audio, fitted_codec):
    two = Codec(fitted_codec.model, 2, "test", published=False)
    where = str(audio.parent / "out" / "codec.safetensors")
    assert find_codec(config(audio)) is False
    storage.publish_bytes(where, two.to_bytes())
    assert find_codec(config(audio)) is True
    for weights in ("calibrate", where):
        with pytest.raises(ConfigError, match=f"bitrate_kbps=3.0: needs 4 codebooks, {where} has 2$"):
            find_codec(config(audio, weights, bitrate_kbps=3.0))


def test_dry_run_refuses_the_folder_of_another_job_and_writes_nothing(audio):
    publish_plan(config(audio), make_plan(config(audio)))
    assert describe_plan(config(audio)).startswith("4 clips in 2 shards")
    with pytest.raises(ConfigError, match="holds a job with another shards"):
        describe_plan(config(audio, clips=3))
    assert names(audio) == ["plan.json"]


def test_dry_run_refuses_weights_that_are_no_codec_and_writes_nothing(audio):
    (weights, *_) = sorted(audio.rglob("*.wav"))
    with pytest.raises(TokenError, match=f"^{weights}: codec.weights is named like"):
        describe_plan(config(audio, str(weights)))
    assert names(audio) == []
