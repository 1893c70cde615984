"""The frozen reference: its kept values are correct, computed once, and never taken from another policy."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dnpo.dsl import HumanChosen
from dnpo.errors import Declined, DiskError, DnpoError, StoreError
from dnpo.evaluate import Evaluation
from dnpo.generate import Ahead, Sampling
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.off import NoJudge
from dnpo.optimise import reference as references
from dnpo.optimise.objective import Facts, PairLogps, logistic
from dnpo.optimise.parts import Cache, FixedNoise, Logistic, Noise, NoNoise, PairOptimisation, TrainableNoise
from dnpo.optimise.reference import KeptHidden, keep_hidden, read_scores, score
from dnpo.policy.lora import Lora
from dnpo.policy.model import Policy, by_length
from dnpo.policy.packing import pack
from dnpo.records import Pair, ReferenceLogps
from dnpo.settings import Bound
from dnpo.stages import verbs
from dnpo.stages.plan import Plan, Run
from dnpo.store import Stage, Store, manifest
from dnpo.store.manifests import seal
from dnpo.tables import read
from tests.conftest import Report, World, torch_optimizer

MakePolicy = Callable[..., Policy]
GIGABYTE = 2**30


def various(world: World, count: int) -> list[Pair]:
    """Pairs of very different lengths, two of them with an empty rejected response."""
    pairs = world.pairs(count)
    for i in (1, count - 2):
        pairs[i] = replace(pairs[i], rejected_ids=[])
    pairs[4] = replace(pairs[4], rejected_ids=pairs[4].rejected_ids[:1], chosen_ids=pairs[4].chosen_ids * 2)
    return pairs


def alone(policy: Policy, pair: Pair) -> tuple[float, float]:
    """log p of both responses, each in its own batch."""
    with torch.no_grad(), policy.evaluating():
        return tuple(
            float(policy.logps(pack([pair.prompt_ids], [ids]))) for ids in (pair.chosen_ids, pair.rejected_ids)
        )


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the number of free bytes on the disk."""

    def free(size: int) -> None:
        monkeypatch.setattr(references.shutil, "disk_usage", lambda path: Usage(10**15, 0, size))

    return free


# --- log-probabilities


@pytest.mark.parametrize(("shard", "tokens"), [(1024, 8192), (1024, 150), (7, 8192), (16, 150)])
def test_scores_equal_those_of_each_response_alone(
    shard: int, tokens: int, make_policy: MakePolicy, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the pairs, though they are computed by length, with shared prompts and in shards."""
    monkeypatch.setattr(references, "SHARD", shard)
    monkeypatch.setattr(references, "by_length", partial(by_length, tokens=tokens))
    policy, pairs = make_policy(), various(world, 40)
    report = Report()
    score(policy, pairs, autocast=False, folder=tmp_path, report=report)
    assert report.done == report.total == 40
    assert len(list(tmp_path.iterdir())) == -(-40 // shard)
    found = read_scores(tmp_path, 40)
    assert [row.pair for row in found] == list(range(40))
    for row, pair in zip(found, pairs, strict=True):
        assert (row.chosen, row.rejected) == pytest.approx(alone(policy, pair), abs=1e-5)
    assert found[1].rejected == 0, "of a response without tokens"
    first = read(tmp_path / "shard-00000.parquet", ReferenceLogps)
    assert [row.pair for row in first] != list(range(len(first))), "the order was undone, not kept by chance"


def test_scoring_does_not_change_the_policy(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy = make_policy()
    policy.model.train()
    before, state = policy.fingerprint(), torch.get_rng_state()
    score(policy, world.pairs(4), autocast=False, folder=tmp_path, report=Report())
    assert policy.model.training
    assert policy.fingerprint() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in policy.model.parameters())


def test_scores_under_autocast_use_bf16_products(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """They have the precision of the training, not that of a float32 policy."""
    policy, pairs = make_policy(), world.pairs(12)
    for autocast in (False, True):
        (tmp_path / str(autocast)).mkdir()
        score(policy, pairs, autocast=autocast, folder=tmp_path / str(autocast), report=Report())
    exact, half = (read_scores(tmp_path / name, 12) for name in ("False", "True"))
    with torch.autocast("cpu", torch.bfloat16):
        directly = [alone(policy, pair) for pair in pairs]
    off = [abs(a.rejected - b.rejected) for a, b in zip(exact, half, strict=True)]
    assert 1e-4 < max(off) < 0.5
    for row, pair in zip(half, directly, strict=True):
        assert (row.chosen, row.rejected) == pytest.approx(pair, abs=0.1)


class Counting:
    """Counts the sequences in a policy's forward passes."""

    def __init__(self, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sequences = 0
        hidden = Policy.hidden

        def counted(this: Policy, batch: Any) -> Tensor:
            self.sequences += batch.count
            return hidden(this, batch)

        monkeypatch.setattr(Policy, "hidden", counted)


@pytest.mark.parametrize("states", [False, True], ids=["scores", "hidden states"])
def test_only_missing_shards_are_made_again(
    states: bool, make_policy: MakePolicy, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill, finished shards do not change, and an incomplete one has another name."""
    monkeypatch.setattr(references, "SHARD", 10)
    policy, pairs = make_policy(), various(world, 34)

    def make(report: Report) -> None:
        if states:
            keep_hidden(policy, pairs, autocast=False, required=True, folder=tmp_path, report=report)
        else:
            score(policy, pairs, autocast=False, folder=tmp_path, report=report)

    make(Report())
    shards = sorted(tmp_path.iterdir())
    assert len(shards) == 4
    contents = {path: path.read_bytes() for path in shards}
    times = {path: path.stat().st_mtime_ns for path in shards}
    shards[1].unlink()
    shards[3].unlink()
    counting, report = Counting(policy, monkeypatch), Report()
    begun: list[int] = []
    monkeypatch.setattr(report, "begin", lambda total, unit, done=0: begun.extend([total, done]))
    make(report)
    assert begun == [34, 20]
    assert report.done == 14
    assert counting.sequences == 14 * (1 if states else 2)
    assert sorted(tmp_path.iterdir()) == shards
    for path in shards:
        assert path.read_bytes() == contents[path]
        assert (path.stat().st_mtime_ns == times[path]) == (path not in (shards[1], shards[3]))


def test_scores_that_do_not_belong_to_the_pairs_are_refused(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    score(make_policy(), world.pairs(6), autocast=False, folder=tmp_path, report=Report())
    with pytest.raises(ValueError, match="expected the log-probabilities of 7 pairs, found 6"):
        read_scores(tmp_path, 7)


# --- hidden states


@pytest.mark.parametrize(("shard", "tokens"), [(1024, 8192), (1024, 150), (7, 8192), (16, 150)])
def test_hidden_states_are_read_back_unchanged(
    shard: int, tokens: int, make_policy: MakePolicy, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For pairs in any order, repeated ones, across shards, and without tokens."""
    monkeypatch.setattr(references, "SHARD", shard)
    monkeypatch.setattr(references, "by_length", partial(by_length, tokens=tokens))
    policy, pairs = make_policy(), various(world, 30)
    facts = keep_hidden(policy, pairs, autocast=False, required=True, folder=tmp_path, report=Report())
    count = sum(len(p.rejected_ids) for p in pairs)
    assert facts == {"tokens": count, "bytes": count * 32 * 4}
    kept = KeptHidden(tmp_path)
    with torch.no_grad():
        directly = [policy.hidden(pack([p.prompt_ids], [p.rejected_ids])) for p in pairs]
    for wanted in ([0], [7, 3, 29], [1], [1, 28], list(range(29, -1, -1)), [5, 5]):
        found = kept(wanted)
        expected = torch.cat([directly[i] for i in wanted])
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_hidden_states_have_the_type_of_the_products(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """bf16 under autocast or with bf16 weights: half the size, and exactly the input of the output head's products."""
    pairs = world.pairs(8)
    half = make_policy()
    half.model.bfloat16()
    for name, policy, autocast, dtype in (
        ("float32", make_policy(), False, torch.float32),
        ("autocast", make_policy(), True, torch.bfloat16),
        ("weights", half, False, torch.bfloat16),
    ):
        folder = tmp_path / name
        folder.mkdir()
        facts = keep_hidden(policy, pairs, autocast=autocast, required=True, folder=folder, report=Report())
        assert facts["bytes"] == facts["tokens"] * 32 * dtype.itemsize
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert facts["bytes"] < size < facts["bytes"] + 2000
        found = KeptHidden(folder)([3])
        assert found.dtype == dtype
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            directly = policy.hidden(pack([pairs[3].prompt_ids], [pairs[3].rejected_ids]))
        torch.testing.assert_close(found.float(), directly.float(), atol=0.05, rtol=0.05)
        with torch.no_grad():
            otherwise = policy.hidden(pack([pairs[3].prompt_ids], [pairs[3].rejected_ids])).to(dtype)
        if autocast:  # the body's products are made in bf16 too
            assert (found - directly).norm() < 0.5 * (found - otherwise).norm()


def test_reading_loads_only_the_requested_rows(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """Shards are memory-mapped: a pair is read as a copy of its rows, not as a view that keeps the whole shard."""
    keep_hidden(make_policy(), world.pairs(60), autocast=False, required=True, folder=tmp_path, report=Report())
    found = KeptHidden(tmp_path)([4, 9])
    assert found.untyped_storage().nbytes() == found.nbytes


def test_the_size_is_reported_before_anything_is_written(
    make_policy: MakePolicy, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report()
    seen: list[list[str]] = []
    hidden = Policy.hidden
    monkeypatch.setattr(Policy, "hidden", lambda this, batch: (seen.append(list(report.notes)), hidden(this, batch))[1])
    pairs = world.pairs(8)
    keep_hidden(make_policy(), pairs, autocast=False, required=True, folder=tmp_path, report=report)
    tokens = sum(len(p.rejected_ids) for p in pairs)
    said = f"the reference's hidden states of {tokens:,} rejected tokens take {tokens * 128 / 1000:.0f} kB on disk"
    assert report.notes == [f"{said} ({tmp_path})"]
    assert seen[0] == report.notes


def test_a_full_disk_is_an_error_only_if_hidden_states_are_required(
    make_policy: MakePolicy, world: World, tmp_path: Path, disk: Callable[[int], None]
) -> None:
    """A gigabyte stays free. Nothing is computed or written before the space is checked."""
    pairs, report = world.pairs(8), Report()
    size = sum(len(p.rejected_ids) for p in pairs) * 128
    make = partial(keep_hidden, make_policy(), pairs, autocast=False, folder=tmp_path, report=report)
    disk(GIGABYTE + size - 1)
    with pytest.raises(DiskError, match=r"npo\.cache_hidden=on: .* rejected tokens take .* has 1\.1 GB free") as error:
        make(required=True)
    assert "auto or off" in str(error.value)
    with pytest.raises(Declined, match="they are computed again in every step instead"):
        make(required=False)
    assert not list(tmp_path.iterdir())
    assert report.notes == []
    disk(GIGABYTE + size)
    make(required=True)
    disk(GIGABYTE + 100)  # existing files need no more space
    make(required=True)


# --- as stages


def run_of(
    world: World,
    make_policy: MakePolicy,
    npo: Noise,
    *,
    lora: int = 0,
    trainer: dict[str, Any] | None = None,
    seed: int = 0,
    weights: int = 0,
    dsl: dict[str, Any] | None = None,
    objective: Any = Logistic(beta=1.0),  # noqa: B008  # frozen
) -> tuple[Run, Stage, Stage, Stage, Stage]:
    """A run of one iteration whose prompts, policy and pairs exist; the policy's weights have the seed ``weights``."""
    pairs = world.pairs(12)

    @dataclass(frozen=True)
    class Model:
        """Stands for ``model=…``."""

        lora: Lora

        def load(self, base: Path, folder: Path | None = None, device: str = "cpu") -> Policy:
            from dnpo.policy.loading import load

            return load(str(base), folder)

    settings = {"optimizer": torch_optimizer("SGD", lr=0.05), "batch_size": 4, "epochs": 2} | (trainer or {})
    parts: dict[str, Any] = {"data": None, "sft": None, "generate": Sampling(), "judge": NoJudge()}
    plan = Plan(
        k=0,
        rollout=Ahead(),
        judge=parts["judge"],
        dsl=HumanChosen(),
        objective=objective,
        npo=npo,
        trainer=PairOptimisation(**settings),
    )
    parts["second_judge"] = parts["judge"]
    parts["ledger"] = Ledger(Path("there-is-no-such-folder/ledger.sqlite"))
    run = Run(seed=seed, device="cpu", model=Model(Lora(rank=lora)), eval=Evaluation(), plans=[plan], **parts)

    def write_base(folder: Path, inputs: Any, report: Any) -> dict[str, Any]:
        make_policy(weights).save(folder / "model")
        return {}

    def write_policy(folder: Path, inputs: Any, report: Any) -> dict[str, Any]:
        (folder / "policy").mkdir()
        return {}

    def write_pairs(folder: Path, inputs: Any, report: Any) -> dict[str, Any]:
        from dnpo.tables import write

        write(folder / "pairs.parquet", pairs, Pair)
        return {}

    prompts = Stage("prompts", "prompts", 1, {"weights": weights}, {}, write_base)
    policy = Stage("sft", "sft", 1, {}, {"prompts": prompts}, write_policy)
    labelled = Stage("pairs", "pairs", 1, {"dsl": dsl or {}}, {}, write_pairs)
    scores = verbs.reference(run, plan, prompts=prompts, policy=policy, pairs=labelled)
    caches = verbs.find_caches(run, plan, prompts, policy, labelled)
    train = verbs.optimise(run, plan, prompts=prompts, policy=policy, pairs=labelled, reference=scores, caches=caches)
    return run, scores, train, policy, labelled


def noise(alpha: float = 0.1, cache: Cache = "off") -> TrainableNoise:
    """Trainable noise, as ``npo=trainable`` configures it."""
    return TrainableNoise(alpha=alpha, learning_rate=0.01, cache_hidden=cache)


PLAIN = NoNoise()
FIXED = FixedNoise(cache_hidden="on")


def test_runs_share_the_reference_of_their_policy_and_pairs(make_policy: MakePolicy, world: World) -> None:
    """Its key is equal for every noise, seed and most trainer settings; it differs for other policies or pairs."""
    given = partial(run_of, world, make_policy)

    def key(*args: Any, **settings: Any) -> str:
        return given(*args, **settings)[1].key

    alphas = {key(noise(alpha)) for alpha in (0.01, 0.1, 1.0)}
    same = {key(PLAIN), key(FIXED), key(noise(cache="on")), key(noise(), seed=1), key(noise(), lora=4)}
    same |= {key(noise(), trainer=some) for some in ({"epochs": 3}, {"batch_size": 8}, {"share_prompt": False})}
    assert len(alphas | same) == 1
    others = {key(noise(), weights=1), key(noise(), dsl={"by": 1}), key(noise(), trainer={"autocast": True})}
    assert len(others | alphas) == 4


def test_settings_that_change_only_rounding_are_in_no_key(make_policy: MakePolicy, world: World) -> None:
    """Settings of memory and time are not in the key; settings that change the result are."""
    given = partial(run_of, world, make_policy)

    def key(part: Noise, **trainer: Any) -> str:
        return given(part, trainer=trainer)[2].key

    plain = key(noise())
    for cache in ("auto", "on"):
        assert key(noise(cache=cache)) == plain
    for some in (
        {"share_prompt": False},
        {"micro_batch_size": 2},
        {"checkpointing": True},
        {"compile": True},
        {"checkpoint_every": 3},
    ):
        assert key(noise(), **some) == plain
    for other in ({"epochs": 3}, {"batch_size": 2}, {"clip": 0.0}, {"autocast": True}, {"warmup": 0.0}):
        assert key(noise(), **other) != plain
    assert key(noise(alpha=0.2)) != plain
    assert key(PLAIN) != plain


def final(store: Store, stage: Stage, report: Report | None = None) -> list[dict[str, float]]:
    """The step metrics of a training stage."""
    folder = store.get(stage, report or Report())
    rows: list[dict[str, float]] = json.loads((folder / "steps.json").read_text())
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def close(one: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> None:
    for ours, theirs in zip(one, other, strict=True):
        for name in ours:
            if name != "rewards/accuracy":
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4), (ours["step"], name)


@pytest.mark.parametrize("lora", [0, 4])
def test_the_hidden_cache_changes_nothing_but_rounding(
    lora: int, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Also with LoRA, where the reference is the policy with its adapter switched off."""
    found = []
    for cache in ("off", "on", "auto"):
        store, report = Store(tmp_path / cache), Report()
        found.append(final(store, run_of(world, make_policy, noise(cache=cache), lora=lora)[2], report))
        shards = list((tmp_path / cache).glob("hidden/*/hidden-*.safetensors"))
        assert len(shards) == (0 if cache == "off" else 1)
        assert any("hidden states" in note for note in report.notes) == (cache != "off")
    close(found[0], found[1])
    assert found[1] == found[2], "auto keeps them too, with two epochs"


def test_one_epoch_reads_nothing_twice(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """``auto`` writes nothing that would be read only once; ``on`` always writes. Epochs count even with steps."""
    for name, trainer, cache, kept in (
        ("a", {"epochs": 1}, "auto", 0),
        ("b", {"epochs": 1}, "on", 1),
        ("c", {"steps": 3}, "auto", 0),
        ("d", {"steps": 4}, "auto", 1),
    ):
        store, report = Store(tmp_path / name), Report()
        final(store, run_of(world, make_policy, noise(cache=cache), trainer=trainer)[2], report)
        assert len(list((tmp_path / name).glob("hidden/*/*.safetensors"))) == kept, name
        assert len(report.notes) == kept, name


def test_no_disk_space_for_the_hidden_cache(
    make_policy: MakePolicy, world: World, tmp_path: Path, disk: Callable[[int], None]
) -> None:
    """``auto`` continues without it and reports this; ``on`` is refused with a message before the training."""
    disk(GIGABYTE)
    store, report = Store(tmp_path), Report()
    _, _, train, _, _ = run_of(world, make_policy, noise(cache="on"))
    with pytest.raises(DiskError, match=r"npo\.cache_hidden=on"):
        store.get(train, report)
    assert not store.has(train)
    rows = final(store, run_of(world, make_policy, noise(cache="auto"))[2], report)
    assert len(rows) == 6
    assert any("computed again in every step" in note for note in report.notes)
    assert not list(tmp_path.glob("hidden/*/*.safetensors"))


def test_a_reference_of_other_weights_is_refused(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """The policy's folder was changed after its reference was made: despite the key, it is another policy's."""
    store = Store(tmp_path)
    _, scores, train, policy, _ = run_of(world, make_policy, noise())
    folder = store.get(scores, Report())
    assert len(manifest(folder)["facts"]["weights"]) == 64
    make_policy(1).save(store.folder(policy) / "policy")
    with pytest.raises(StoreError, match=r"policy/model.safetensors was not written by it"):
        store.get(train, Report())
    _reseal(store.folder(policy))  # as if it was computed again, with another result
    with pytest.raises(DnpoError, match=f"{folder} was made by other weights than this iteration starts from") as error:
        store.get(train, Report())
    assert "remove that folder" in str(error.value)
    assert not store.has(train)
    # As the message says:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink()
    folder.rmdir()
    assert len(final(store, train)) == 6


def _reseal(folder: Path, content: dict[str, Any] | None = None) -> None:
    known = content or manifest(folder)
    seal(folder, {name: value for name, value in known.items() if name != "checksum"})


@pytest.mark.parametrize("which", ["reference", "hidden"])
def test_a_tampered_manifest_is_refused(which: str, make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """The wrong cache can be either of the two."""
    store = Store(tmp_path)
    _, scores, train, _, _ = run_of(world, make_policy, noise(cache="on"))
    store.get(scores, Report())
    store.get(train.caches["hidden"], Report())
    (path,) = tmp_path.glob(f"{which}/*/manifest.json")
    content = json.loads(path.read_text())
    content["facts"]["weights"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=rf"{which}/.* is damaged: manifest.json has other contents"):
        store.get(train, Report())
    _reseal(path.parent, content)
    with pytest.raises(DnpoError, match=rf"{path.parent} was made by other weights .*0000000000000000"):
        store.get(train, Report())


def test_noise_that_reads_nothing_keeps_nothing(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """SPIN keeps no hidden states; fixed noise does."""
    assert run_of(world, make_policy, PLAIN)[2].caches == {}
    assert set(run_of(world, make_policy, FIXED)[2].caches) == {"hidden"}
    assert len(final(Store(tmp_path), run_of(world, make_policy, FIXED)[2])) == 6
    assert len(list(tmp_path.glob("hidden/*/*.safetensors"))) == 1


def test_runs_share_the_hidden_states(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """A sweep over α makes them once, also for its job with fixed noise."""
    store = Store(tmp_path)
    for part in (noise(0.01, "on"), noise(0.1, "auto"), FIXED):
        final(store, run_of(world, make_policy, part)[2])
    assert len(list(tmp_path.glob("hidden/*/manifest.json"))) == 1
    assert len(list(tmp_path.glob("reference/*/manifest.json"))) == 1
    assert len(list(tmp_path.glob("optimise/*/manifest.json"))) == 3


@dataclass(frozen=True)
class ByTemperature:
    """The logistic loss with 1/β as its setting; β, or another scale for reported margins, is a property."""

    temperature: float
    reported: float | None = None

    @property
    def beta(self) -> float:
        """The scale of reported margins."""
        return 1 / self.temperature if self.reported is None else self.reported

    def __call__(self, policy: PairLogps, reference: PairLogps, facts: Facts) -> Tensor:
        """A loss for each pair."""
        return logistic(policy, reference, facts, beta=1 / self.temperature)


def test_margins_are_reported_at_the_beta_of_the_objective(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """As a field, a property, or a setting of a function; no other number is used."""

    def steps(objective: Any, name: str, npo: Noise | None = None) -> list[dict[str, float]]:
        return final(Store(tmp_path / name), run_of(world, make_policy, npo or noise(), objective=objective)[2])

    known = steps(Logistic(beta=0.25), "field")
    assert steps(ByTemperature(4.0), "property") == known
    assert steps(Bound("dnpo.optimise.objective.logistic", {"beta": 0.25}), "function") == known
    scaled = ["margin/clean", "margin/noisy", "margin/shift", "rewards/chosen", "rewards/rejected"]
    fixed = FixedNoise()  # not trained: the noise term follows the reported β too
    once, doubled = steps(Logistic(beta=0.25), "once", fixed), steps(ByTemperature(4.0, reported=0.5), "doubled", fixed)
    for ours, theirs in zip(once, doubled, strict=True):
        assert [theirs[name] for name in scaled] == pytest.approx([2 * ours[name] for name in scaled], rel=1e-5)
        assert (ours["loss/policy"], ours["logps/chosen"]) == (theirs["loss/policy"], theirs["logps/chosen"])
