"""The training loop of one worker.

It restores the newest checkpoint. For each batch it then computes the loss, takes a step, updates the bank, logs and
saves.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import traceback
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raysl import checkpoint, optim, ray_cluster
from raysl.backbone import norm
from raysl.checkpoint import Saver
from raysl.communication import collective
from raysl.config import Pretraining
from raysl.contrastive.bank import MemoryBank
from raysl.dataset import DataSet
from raysl.errors import UserError, name_plugin_in_errors
from raysl.model import Model, model_config
from raysl.objectives import AfterEpoch, AfterStep, Alternates, Loss
from raysl.ray_cluster.placement import Placement
from raysl.rng import key
from raysl.run import METADATA, MetricsLog, Run
from raysl.storage import StorageError
from raysl.stream import shared
from raysl.stream.plan import Plan
from raysl.stream.reader import Batch, ColumnReader, Stream
from raysl.training.progress_actor import (
    SAVING,
    WAITING_FOR_IMAGES,
    WAITING_FOR_WORKERS,
    Progress,
    RemoteProgress,
    format_step,
)
from raysl.training.stop_sync import StopSync

# Longest time for an exchange between the workers; after it they begin again from the newest checkpoint.
EXCHANGE_TIMEOUT_S = 1800
# A slow step has a line of its own if the last line is older than so many seconds.
_SILENT_S = 10.0
OUT_OF_MEMORY = "A training worker ran out of GPU memory. Lower --batch-size, or use more GPUs (--workers)."


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to train; it is sent to the worker by pickle."""

    config: dict[str, Any]
    run: Run
    dataset: DataSet
    placement: Placement
    progress_actor: Any = None  # the actor that the workers post to; None without one
    until: int | None = None  # the step to stop after, with a checkpoint; None for the end of the plan
    # Access to a stream that is shared with other runs; None if the run reads its own stream.
    subscriber: shared.Subscriber | None = None
    timeout_s: int = EXCHANGE_TIMEOUT_S  # time for an exchange between the workers


class Worker:
    """One training worker: its model, optimizer, bank and stream (from Ray Data without `reader`), and the step."""

    def __init__(
        self,
        job: Job,
        device: torch.device,
        progress: Progress | None = None,
        reader: ColumnReader | None = None,
    ) -> None:
        self.job = job
        self.progress = progress or Progress()
        self.reader = reader
        self.config = config = Pretraining.from_json(job.config)
        self.device = device
        if device.type == "cuda":
            _configure_cuda(config.deterministic)
        self.rank, self.world = collective.rank(), collective.world()
        self.plan = config.plan(job.dataset)
        self.model = Model.of(model_config(config, job.run.checkpoints), job.dataset).to(device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = optim.build(config.optim, self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        dim = self.model.objective.bank_dim
        self.bank = MemoryBank(job.dataset.num_images, dim, config.bank, config.seed, device) if dim else None
        self.saver = Saver(job.run.checkpoints, config.save, self.rank, self.world)
        self.step = 0

    def restore(self) -> None:
        """Resume from the newest complete checkpoint. Rank 0 chooses it for all workers.

        Raises:
            UserError: this worker cannot read the folder of the run.
        """
        if not self.job.run.folder.exists(METADATA):
            raise self._not_found("run")
        step = 0
        if self.rank == 0:
            step = checkpoint.newest_step(self.job.run.checkpoints)
            checkpoint.delete_after(self.job.run.checkpoints, step)
        step = int(collective.total(torch.tensor(step, device=self.device)).item())  # The others add 0.
        if step == 0:
            return
        chosen = checkpoint.checkpoint_of_step(self.job.run.checkpoints, step)
        if chosen is None:
            raise self._not_found(f"checkpoint of step {step}")
        # A worker reads only its own rows of the bank.
        state, bank = chosen.load(*((self.bank.first, self.bank.last) if self.bank is not None else (0, 0)))
        chosen.fill(self.model, chosen.network(state))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.bank is not None:
            self.bank.load(bank)
        self.step = step

    def _not_found(self, what: str) -> UserError:
        return UserError(
            f"A worker cannot find the {what} in {str(self.job.run.folder)!r}. All machines must be able to read "
            "--run: use storage that they share, such as s3://bucket/run."
        )

    def state(self) -> dict[str, Any]:
        """Return the state to save besides the bank. Random numbers need no state: they follow from seed and step."""
        return {
            "network": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }

    @name_plugin_in_errors()
    def train(self) -> None:
        """Train from the restored step to the end of the job, or until the worker group is asked to stop.

        Raises:
            UserError: the loss is no longer finite, a checkpoint cannot be written, the data set is damaged, or
                code of the user fails.
        """
        log = MetricsLog(self.job.run, self.step) if self.rank == 0 else None
        try:
            self._loop(log)
        except StorageError:
            log = None  # The write was retried for long enough; a flush would only retry it again.
            raise
        finally:
            if log is not None:
                log.flush()

    def _loop(self, log: MetricsLog | None) -> None:
        saves = self.config.save.describe()
        lost_steps = 0 if log is None else self.progress.begin(self.step, self.world, log.reached, saves)
        distributed = self.wrapped_model()
        meter = Meter(self.step, self.plan, self.world, lost_steps)
        queue = DeviceQueue(self.device)
        stop_sync = StopSync(self.step, self.progress.stop_requested, self.device)
        end = self.plan.num_steps if self.job.until is None else min(self.job.until, self.plan.num_steps)
        last_line_s = -math.inf
        self.progress.set_activity(self.step, WAITING_FOR_IMAGES)
        for batch in shared.batches(self._stream(), self.job.subscriber, self.step, end):
            self.progress.set_activity(self.step, WAITING_FOR_WORKERS)
            lr = self.config.optim.lr_at(self.step, self.plan.num_steps, self.config.batch_size)
            loss = self.update(distributed, batch, lr)
            self.step += 1
            queue.limit()
            meter.add(batch, loss)
            stops, since_s = stop_sync.exchange(self.step, self.saver.since_s)
            if stops:
                self.progress.stop_agreed()
            last = stops or self.step == end
            if last or self.step % self.config.log_every == 0:
                row = meter.row(self.step, lr)
                self._check(row["loss"])
                last_line_s = time.monotonic()
                if log is not None:
                    log.add(row)
                    self.progress.post(row)
            elif log is not None and time.monotonic() - last_line_s > _SILENT_S:
                last_line_s = time.monotonic()
                with_loss = min(end, self.step - self.step % self.config.log_every + self.config.log_every)
                self.progress.say(format_step(self.step, self.plan.num_steps, with_loss))
            if last or self.saver.due(self.step, since_s):
                self._check(*self._loss_and_finite(loss.loss))
                if log is not None:
                    log.flush()
                self.progress.set_activity(self.step, SAVING)
                self.save()
            if stops:
                break
            self.progress.set_activity(self.step, WAITING_FOR_IMAGES)
        self.progress.set_activity(self.step, SAVING)
        self.saver.wait()

    def update(self, model: nn.Module, batch: Batch, lr: float) -> Loss:
        """Take a step of the optimizer, then update the objective and the bank."""
        # Dropout and stochastic depth use torch's generators. A seed per step gives a resumed run the same numbers.
        torch.manual_seed(key(self.config.seed, "step", self.step, self.rank) >> 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self._autocast():
            outputs = model(batch.views)
            loss = self.model.objective.loss(outputs, batch, self.bank)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss.loss).backward()  # type: ignore[no-untyped-call]
        if self.config.optim.clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if isinstance(self.model.objective, AfterStep):
            self.model.objective.after_step(self.model.backbone, self.step)
        if isinstance(self.model.objective, AfterEpoch):
            images, n = (self.step + 1) * self.config.batch_size, self.plan.num_images
            if images // n > self.step * self.config.batch_size // n:
                self.model.objective.after_epoch(self.model.backbone, images // n - 1)
        if self.bank is not None and loss.bank_update_bd is not None:
            self.bank.update(batch.indices_b, loss.bank_update_bd)
        return loss

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def wrapped_model(self) -> nn.Module:
        """Return the model to train: with synchronized BatchNorm, compiled and data-parallel, as configured."""
        if self.config.backbone.norm == "sync" and self.world > 1:
            norm.synchronize(self.model, self.device)
        model: nn.Module = self.model
        if self.config.compile:
            norm.prepare_compilation()
            model = torch.compile(model)  # type: ignore[assignment]
        if self.world == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=isinstance(self.model.objective, Alternates),
            gradient_as_bucket_view=True,
        )

    def _stream(self) -> Stream:
        share = self.job.placement.share
        stream = self.model.stream(self.job.dataset, share, self.rank, self.world, self.device)
        return replace(stream, reader=self.reader)

    def _loss_and_finite(self, loss: Tensor) -> list[float]:
        """Return the mean loss, and 1.0 if all weights are finite. A gradient of NaN leaves its own loss finite."""
        finite = torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).all()
        values: list[float] = collective.mean(torch.stack([loss.detach().float(), finite.float()])).tolist()
        return values

    def _check(self, loss: float, finite: float = 1.0) -> None:
        """Raise UserError for a loss or weights that are not finite, so that no checkpoint contains them."""
        if not math.isfinite(loss) or finite < 1:
            what = f"loss became {loss}" if not math.isfinite(loss) else "weights became infinite or NaN"
            saved = checkpoint.newest_step(self.job.run.checkpoints)
            kept = (
                f"the checkpoint of step {saved} is still valid"
                if saved
                else "no checkpoint had been saved yet"
            )
            raise UserError(
                f"The {what} at step {self.step}, so training stopped; {kept}. Start a new run (another --run) "
                "with a lower --optim.lr, with --optim.clip-norm 1, or with --precision fp32."
            )

    def save(self) -> None:
        """Save the network by rank 0, and the bank by rank 0 if it is replicated, otherwise by every worker."""
        writes_bank = self.rank == 0 or self.config.bank.placement == "sharded"
        bank = self.bank.state() if self.bank is not None and writes_bank else None
        self.saver.save(self.step, self.state() if self.rank == 0 else None, bank)


class DeviceQueue:
    """Keep the host at most two steps ahead of a GPU, because every step that waits holds its batch in memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: deque[torch.cuda.Event] = deque()

    def limit(self) -> None:
        """Block until at most two steps are queued on the GPU."""
        if self._device.type != "cuda":
            return
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        end.record()
        self._ends.append(end)
        if len(self._ends) > 2:
            self._ends.popleft().synchronize()


def _configure_cuda(deterministic: bool) -> None:
    """Choose the algorithms of a training process on a GPU.

    Matrix products stay in full float32, because small temperatures amplify rounding errors of the scores; convolutions
    of fp32 runs use TF32, which is torch's default.
    """
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    mode = 2 if deterministic else 0  # torch's names for them are "error" and "default"
    if torch.get_deterministic_debug_mode() != mode:  # to set it imports torch's compiler
        torch.use_deterministic_algorithms(deterministic)


class Meter:
    """Averages of metrics over the steps since the last row, and over the workers."""

    def __init__(self, step: int, plan: Plan, world: int = 1, lost_steps: int = 0) -> None:
        self._plan = plan
        self._world = world
        self._lost_steps = lost_steps
        self._started_at = time.perf_counter()
        self._started_step = step
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._steps = 0
        self._wait_s = 0.0
        self._sums: dict[str, Tensor] = {}
        # Some steps may lack a metric, such as the loss of one task of several.
        self._counts: Counter[str] = Counter()

    def add(self, batch: Batch, loss: Loss) -> None:
        """Add one step."""
        self._steps += 1
        self._wait_s += batch.wait_s
        for name, value in {"loss": loss.loss.detach(), **loss.metrics}.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._counts[name] += 1

    def row(self, step: int, lr: float) -> dict[str, Any]:
        """Return the row for metrics.jsonl. Every worker must call it at the same steps."""
        names = list(self._sums)
        means = [self._sums[name].float() / self._counts[name] for name in names]
        wait_s = torch.tensor([self._wait_s], device=means[0].device)
        values = collective.mean(torch.cat([torch.stack(means), wait_s])).tolist()
        wall_s = time.perf_counter() - self._since
        done = step - self._started_step
        per_step_s = (time.perf_counter() - self._started_at) / done
        row: dict[str, Any] = {"step": step, "epoch": step * self._plan.batch_size / self._plan.num_images}
        row.update(zip(names, values[:-1], strict=True))
        # The number of averaged steps is less in the first row after a restart.
        row |= {"over_steps": self._steps, "workers": self._world}
        if self._lost_steps:
            row["lost_steps"], self._lost_steps = self._lost_steps, 0
        row |= {"lr": lr, "images_per_s": self._steps * self._plan.batch_size / wall_s, "wait_s": values[-1]}
        row["wait_share"] = min(1.0, values[-1] / wall_s)
        row["eta_s"] = (self._plan.num_steps - step) * per_step_s
        self._reset()
        return row


def work(job: Job) -> None:
    """Train in one worker of a Ray Train worker group. Ray Train calls it again after a failure."""
    import ray
    import ray.train.torch

    if ray.get(job.progress_actor.failure.remote()):
        return
    job.progress_actor.register.remote(ray.get_runtime_context().current_actor)
    torch.set_num_threads(job.placement.threads_per_worker)
    worker: Worker | None = None
    progress = RemoteProgress(job.progress_actor, collective.rank())
    if collective.world() > 1:
        progress.watch(job.timeout_s)
    try:
        worker = Worker(job, ray.train.torch.get_device(), progress)
        worker.restore()
        worker.train()
    except UserError as error:
        found = ray_cluster.user_error(error) or error  # of a data task, without the traceback
        ray.get(
            job.progress_actor.fail.remote(found if type(found) is StorageError else UserError(str(found)))
        )
        raise
    except torch.OutOfMemoryError as error:
        ray.get(job.progress_actor.fail.remote(UserError(f"{OUT_OF_MEMORY} {error}")))
        raise
    except Exception:
        step = worker.step if worker else 0
        ray.get(job.progress_actor.crash.remote(step, collective.rank(), traceback.format_exc()))
        raise
    finally:
        progress.close()
