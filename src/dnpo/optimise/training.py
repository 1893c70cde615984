"""The base class of trainings: policy steps of micro-batches, with one update of all players per step, and checkpoints.

The whole training is one pass over a fixed list of policy steps. A checkpoint has the position in this list, the states
of optimizers and schedule, and what the kind of training adds. The metrics of all steps are in a file next to it
(``history.py``). On a CPU, a killed training continues with exactly the same results.

Several processes can train together (``ranks.py``). Each computes the gradients of its share of the rows. The gradients
are summed over all processes before the update, so that the weights stay equal. A checkpoint does not depend on the
number of processes.
"""

import inspect
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dnpo import disk, ranks
from dnpo.errors import NonFiniteLossError, OutOfMemoryError, StoreError
from dnpo.interrupts import Held
from dnpo.optimise.batches import MicroBatch
from dnpo.optimise.held import HeldOut, discard
from dnpo.optimise.history import History
from dnpo.optimise.parts import Optimisation
from dnpo.optimise.steps import Idle, Steps
from dnpo.policy.model import Policy
from dnpo.policy.sharded import gather_weight, is_part, shard
from dnpo.store import Report

CHECKPOINT, HISTORY = "checkpoint.ckpt", "steps.jsonl"


class Trainee(Protocol):
    """A model in training: a policy, or a reward model."""

    @property
    def model(self) -> nn.Module:
        """The module whose weights change."""

    @property
    def device(self) -> torch.device:
        """The device that its weights are on."""


class _Passed(NamedTuple):
    """What the forward and backward passes of a policy step give besides gradients.

    Attributes:
        row: each metric, or one rank's part of it.
        ids: ids of the rows.
        tokens: number of tokens that went through the model.
    """

    row: dict[str, float]
    ids: list[str]
    tokens: int


class Training(pl.LightningModule):
    """Manual optimisation of one or more players on micro-batches in a fixed order.

    Attributes:
        title: its name in messages.
        setting: the name of its settings in messages.
        remedy: advice on a loss that is not finite.
        held: measures the loss on held-out rows; None if nothing asks for it.

    Args:
        policy: the model to train; its module is the first player.
        optimisation: how to train.
        total: number of policy steps in the whole training.
        report: receives the progress.
    """

    title: ClassVar[str] = "training"
    setting: ClassVar[str] = "trainer"
    remedy: ClassVar[str] = (
        "lower the learning rate (trainer.optimizer.lr, npo.learning_rate) or look at these rows. The last checkpoint "
        "is kept"
    )

    def __init__(self, policy: Trainee, optimisation: Optimisation, total: int, report: Report) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints have only trained weights, not frozen base weights
        self.policy_module = policy.model
        self.policy, self.optimisation, self.total, self.report = policy, optimisation, total, report
        self.ranks, self.leads = ranks.world(), ranks.leads()
        self.policy_step = 0
        self.held: HeldOut | None = None
        self.history: list[dict[str, float]] = []
        self._clock = time.monotonic()

    def terms(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the mean loss of a :class:`MicroBatch`, and its metrics."""
        raise NotImplementedError

    @property
    def sharded(self) -> bool:
        """Whether the policy's weights are divided among the ranks."""
        return self.optimisation.parallel == "sharded"

    def configure_model(self) -> None:
        """Divide the policy's weights among the ranks, if so configured."""
        if self.sharded and self.device_mesh is not None:
            for policy in self.shared_policies:
                shard(policy, self.device_mesh["data_parallel"])

    @property
    def shared_policies(self) -> list[Policy]:
        """The policies whose weights can be divided among ranks."""
        assert isinstance(self.policy, Policy), "only policies are sharded"
        return [self.policy]

    @property
    def players(self) -> list[tuple[str, nn.Module]]:
        """The players by name: the policy, and other modules with parameters."""
        return [("policy", self.policy_module)]

    @property
    def transformer(self) -> Any:
        """The transformers model in training, without its wrapper for adapters."""
        module: Any = self.policy_module
        return module.get_base_model() if hasattr(module, "peft_config") else module

    # --- one step

    def transfer_batch_to_device(
        self, batch: list[MicroBatch], device: torch.device, dataloader_idx: int
    ) -> list[MicroBatch]:
        """Leave the batch on the CPU; each micro-batch is moved just before its forward pass."""
        return batch

    def training_step(self, batches: list[MicroBatch | Idle[MicroBatch]], batch_idx: int) -> None:
        """Run the backward pass of a policy step's micro-batches, then clip gradients and update every player."""
        passed = self._backward(batches) if self.ranks == 1 else self._backward_together(batches)
        self._step(*passed)

    def _backward(self, given: "Sequence[MicroBatch | Idle[MicroBatch]]") -> _Passed:
        """Backward through this process's micro-batches."""
        row: dict[str, float] = {}
        factor = self.ranks if self.sharded else 1  # gradients of divided weights are averaged over ranks
        for each in given:
            idle, batch = isinstance(each, Idle), each.batch if isinstance(each, Idle) else each
            loss, metrics = self.terms(batch.to(self.device))
            if idle:
                self.manual_backward(loss * 0.0)
                continue
            self._finite("loss", float(loss.detach()), batch.ids)
            self.manual_backward(loss * (batch.share * factor))
            for name, value in metrics.items():
                row[name] = row.get(name, 0.0) + float(value.detach()) * batch.share
        batches = [each for each in given if not isinstance(each, Idle)]
        return _Passed(row, [i for batch in batches for i in batch.ids], sum(batch.tokens for batch in batches))

    def _backward_together(self, given: "Sequence[MicroBatch | Idle[MicroBatch]]") -> _Passed:
        """Backward through the micro-batches of all ranks, and add up their metrics and gradients."""
        trained = [p for _, player in self.players for p in player.parameters() if p.requires_grad]

        def compute() -> tuple[_Passed, bytes]:
            passed = self._backward(given)
            return passed, bytes(p.grad is not None for p in trained)

        if self.sharded:  # ranks wait for each other in every block, so a rank that has failed cannot tell others
            own = compute()
            found = ranks.gather(lambda: own)
        else:
            found = ranks.gather(compute)
        self._sum_gradients(trained, [graded for _, graded in found])
        row: dict[str, float] = {}
        for passed, _ in found:
            for name, value in passed.row.items():
                row[name] = row.get(name, 0.0) + value
        return _Passed(row, [i for each, _ in found for i in each.ids], sum(each.tokens for each, _ in found))

    def _sum_gradients(self, trained: Sequence[nn.Parameter], graded: Sequence[bytes]) -> None:
        """Sum the gradients over all ranks, except for divided weights; a rank without rows adds zeros.

        Args:
            trained: the parameters of all players that are trained.
            graded: which of them have a gradient, on each rank.
        """
        anywhere = [p for p, *has in zip(trained, *graded, strict=True) if any(has) and not is_part(p)]
        for p in anywhere:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in anywhere if p.grad is not None]
        ranks.sum_(grads)
        if self.sharded:
            for grad in grads:
                grad /= self.ranks

    def _step(self, row: dict[str, float], ids: Sequence[str], tokens: int) -> None:
        optimizers = _as_list(self.optimizers())
        plain = _as_list(self.optimizers(use_pl_optimizer=False))
        for (name, module), optimizer in zip(self.players, plain, strict=True):
            limit = self.optimisation.clip or math.inf
            trained = [p for p in module.parameters() if p.requires_grad]
            total = nn.utils.clip_grad_norm_(trained, limit)
            norm = float(gather_weight(total) if self.sharded else total)
            self._finite(f"gradient norm of the {name}", norm, ids)
            row[f"grad_norm/{name}"] = norm
            row[f"lr/{name}"] = optimizer.param_groups[0]["lr"]
        # Lightning counts every step of its wrapped optimizers; only the policy's should count.
        for optimizer in [optimizers[0], *plain[1:]]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for scheduler in _as_list(self.lr_schedulers()):
            scheduler.step()
        row["tokens_per_second"] = tokens / max(time.monotonic() - self._clock, 1e-9)
        if self.held is not None:
            row |= self.held.look(self.policy_step + 1, self.total, self.policy_module)
        self._clock = time.monotonic()
        row = {"step": float(self.policy_step), "rows": float(len(ids)), **row}
        self.history.append(row)
        self.policy_step += 1
        if self.leads:
            self.report.advance()
            self.report.steps([row])

    def _finite(self, what: str, value: float, ids: Sequence[str]) -> None:
        """Raise before an update that would write NaN into the weights and the next checkpoint."""
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"{self.title}, step {self.policy_step}: the {what} is {value} on rows {', '.join(ids)}; {self.remedy}"
            )

    def configure_optimizers(self) -> Any:
        """The policy's optimizer with its schedule by policy steps."""
        trained = [p for p in self.policy_module.parameters() if p.requires_grad]
        how = self.optimisation.optimizer
        make = cast(Callable[..., Optimizer], how.resolve())
        # Not every optimizer has its fused form for parts of weights.
        optimizer = make(trained, **how.settings) if self.sharded else make_fused(make, trained, how.settings)
        schedule_ = LambdaLR(optimizer, lambda step: self.optimisation.factor(step, self.total))
        return [optimizer], [schedule_]

    def advise(self, short: str, fits: int) -> str:
        """The error message for a step that does not fit into memory.

        Args:
            short: torch's message.
            fits: number of rows that fit at once, found by trying; 0 if not even one row fits.
        """
        optimisation = self.optimisation
        if fits:
            way = (
                f"{self.setting}.micro_batch_size={fits} fits, as tried on the rows of this step, and changes nothing "
                f"but rounding: {optimisation.batch_size} rows still make one step"
            )
        elif not optimisation.checkpointing:
            way = (
                f"not even one row at once fits; try {self.setting}.checkpointing=true, model.lora.rank=16 or a "
                "shorter data limit"
            )
        else:
            way = "not even one row at once fits; try model.lora.rank=16 or a shorter data.max_response_tokens"
        now = f"with {optimisation.rows_at_once} rows at once"
        return f"step {self.policy_step}: out of memory {now} ({short}). {way}. The last checkpoint is kept"

    # --- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the number of the next step; remove weights that are not trained."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}
        checkpoint["training"] = {"policy_step": self.policy_step}
        if self.held is not None:
            checkpoint["held"] = self.held.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the number of the next step."""
        self.policy_step = checkpoint["training"]["policy_step"]
        if self.held is not None:
            self.held.load_state_dict(checkpoint["held"])

    def on_train_start(self) -> None:
        """Report the progress, after a checkpoint is loaded."""
        self.report.begin(self.total, "steps", self.policy_step)
        self.report.steps(self.history)
        if self.held is not None and not self.policy_step:
            self.held.look(0, self.total, self.policy_module)
        self._clock = time.monotonic()


class _Checkpoints(pl.Callback):
    """Writes a checkpoint every ``every`` policy steps, and when a signal asks the process to end.

    A checkpoint replaces the last one only when it is complete. Rank 0 writes it.
    """

    def __init__(self, folder: Path, every: int, signals: Held) -> None:
        self.path, self.every, self.signals = folder / CHECKPOINT, every, signals
        self.history = History(folder / HISTORY)

    def state_dict(self) -> dict[str, Any]:
        """The part of the history that a checkpoint contains."""
        return {"checksum": self.history.checksum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore this part of the history."""
        self.history.checksum = state_dict["checksum"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Read the history, and take over the signals from Lightning, which would end without a checkpoint."""
        training = cast(Training, module)
        training.history = self.history.load(training.policy_step, cut=ranks.leads())
        self.signals.hold()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """Write a checkpoint if one is due, then let signals end the training."""
        step, total = cast(Training, module).policy_step, cast(Training, module).total
        ending = any(ranks.gather(lambda: bool(self.signals.waiting)))  # all ranks end if one must end
        if ending or (step % self.every == 0 and step < total):
            if ranks.leads():
                self.history.save(cast(Training, module).history)
            self._write(trainer, everyone=cast(Training, module).sharded)
            held = cast(Training, module).held
            if held is not None and ranks.leads():
                held.tidy()
            ranks.wait()
        if ending:
            self.signals.deliver()

    def _write(self, trainer: pl.Trainer, everyone: bool) -> None:
        """Write a checkpoint.

        Args:
            everyone: whether all ranks have parts of the weights that rank 0 writes.
        """
        aside = disk.name_aside(self.path)
        if everyone or ranks.leads():
            trainer.save_checkpoint(aside)
        if ranks.leads():
            disk.replace(aside, self.path)


def fit(module: Training, batches: Steps[Any, Any], folder: Path) -> list[dict[str, float]]:
    """Run the training, from the checkpoint in ``folder`` if there is one, and return its history.

    Raises:
        OutOfMemoryError: a step does not fit into memory; the message gives the micro-batch size that fits, found by
            trying.
    """
    if not len(batches):
        return []
    checkpoint = _find_checkpoint(folder)
    optimisation, transformer = module.optimisation, module.transformer
    device = module.policy.device
    signals = Held("the training ends after a checkpoint at the end of this step")
    trainer = pl.Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        **_devices(module.sharded, device),
        max_epochs=1,
        precision="bf16-mixed" if optimisation.autocast else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[LightningEnvironment()],  # otherwise, on SLURM, Lightning would requeue the job
        callbacks=[_Checkpoints(folder, optimisation.checkpoint_every, signals)],
    )
    batches.even = module.sharded
    batches.over = lambda: module.held is not None and module.held.over
    module.policy.model.train()
    if optimisation.checkpointing:
        transformer.gradient_checkpointing_enable({"use_reentrant": False})
    if optimisation.compile:
        transformer.base_model.compile(dynamic=True)  # lengths differ between batches
    short = ""
    with _interruptible(signals):
        try:
            trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            short = str(error).strip().splitlines()[-1]
    if short and module.sharded:  # trying smaller sizes would need all ranks
        raise OutOfMemoryError(
            f"step {module.policy_step}: out of memory ({short}). Try a smaller {module.setting}.micro_batch_size, "
            f"{module.setting}.checkpointing=true or more devices. The last checkpoint is kept"
        )
    if short:  # outside the handler, since the error keeps the step's tensors alive
        module.to(device)  # Lightning has moved it to the CPU
        fits = min(ranks.gather(lambda: _fitting(module, batches)))
        raise OutOfMemoryError(module.advise(short, fits))
    if optimisation.checkpointing:
        transformer.gradient_checkpointing_disable()
    module.policy.model.eval()
    if module.held is not None:
        module.held.finish(module.policy_module)
    return module.history


def _devices(sharded: bool, device: torch.device) -> dict[str, Any]:
    """Lightning's settings of devices: this device, or the devices of all ranks if they divide the weights."""
    if not sharded:
        return {"devices": 1 if device.index is None else [device.index]}
    from pytorch_lightning.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(
        data_parallel_size=ranks.world(), tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    return {"devices": ranks.here(), "num_nodes": ranks.world() // ranks.here(), "strategy": strategy}


def make_fused(
    optimizer: Callable[..., Optimizer], parameters: Sequence[nn.Parameter], settings: Mapping[str, Any]
) -> Optimizer:
    """Make the optimizer, in torch's fused form if there is one: the same update, in one kernel for all parameters."""
    known = inspect.signature(optimizer).parameters
    fuse = "fused" in known and not {"fused", "foreach", "differentiable"} & set(settings)
    return optimizer(parameters, **settings, **({"fused": True} if fuse else {}))


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _fitting(module: Training, batches: Steps[Any, Any]) -> int:
    """Find, by halving, the largest micro-batch size with which the failed step fits into memory; 0 if none fits."""
    rows = len(ranks.share(batches.group(module.policy_step)))
    size = min(module.optimisation.rows_at_once, rows)
    if not rows:
        return module.optimisation.rows_at_once
    autocast = torch.autocast(module.policy.device.type, torch.bfloat16, enabled=module.optimisation.autocast)
    while size > 1:
        size //= 2
        for _, player in module.players:
            player.zero_grad(set_to_none=True)
        if module.policy.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            with autocast:
                for batch in (each for each in batches.step(module.policy_step, size) if not isinstance(each, Idle)):
                    loss, _ = module.terms(batch.to(module.policy.device))
                    (loss * batch.share).backward()
            return size
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
    return 0


def _find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a killed training left, if there is one.

    Raises:
        StoreError: it is damaged.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        damaged = str(error)
    if damaged is not None:
        raise StoreError(f"{path}: is damaged ({damaged}); remove it, and the training begins again")
    return path


def has_checkpoint(folder: Path) -> bool:
    """Whether a training in this folder would continue from a checkpoint."""
    return (folder / CHECKPOINT).is_file()


def discard_checkpoint(folder: Path) -> None:
    """Remove the checkpoint and the history that :func:`fit` leaves, once the trained weights are written."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    discard(folder)
    History(folder / HISTORY).discard()


@contextmanager
def _interruptible(signals: Held) -> Iterator[None]:
    """Raise the KeyboardInterrupt that Lightning turns into an exit, and restore the handlers of signals."""
    try:
        yield
    except SystemExit as stopped:
        if isinstance(stopped.__context__, KeyboardInterrupt):
            raise stopped.__context__ from None
        raise
    finally:
        signals.release()


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
