"""The training run: steps, metrics, sample grids, checkpoints, and going on where it stopped."""

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from soflow_fast import build, checkpoint, distributed, given, memory, posthoc, run_folder, stopping, weights
from soflow_fast.augment import Augment
from soflow_fast.autoencoder import decoder_of
from soflow_fast.checkpoint import CHECKPOINTS
from soflow_fast.conditions import null_condition
from soflow_fast.config import TrainConfig
from soflow_fast.data import batches, load_resident
from soflow_fast.data.checks import described
from soflow_fast.dit import DiT
from soflow_fast.ema import EMA, PowerEMA
from soflow_fast.evaluate import check_evaluation, why_unscored
from soflow_fast.fingerprint import fingerprint
from soflow_fast.frozen import Frozen
from soflow_fast.grids import Grids
from soflow_fast.images import are_images, labels_of_samples
from soflow_fast.logs import Meter, Quiet, RunLog, due
from soflow_fast.optim import can_leave_out
from soflow_fast.records import of_given
from soflow_fast.run_folder import load_run
from soflow_fast.run_optimizer import RunOptimizer
from soflow_fast.scoring import Scoring
from soflow_fast.skipping import require_few
from soflow_fast.step import TrainStep
from soflow_fast.stopping import StopSignal
from soflow_fast.validation import Validation, build_validation, describe_validation

__all__ = ["Trainer", "load_run"]


class Trainer:
    """One training run in a folder; the same call again resumes where it stopped.

    The trained weights are a pure function of the configuration, the data, the network, the optimizer and the initial
    weights. Stopping, even by a kill, and resuming changes nothing (bitwise on a CPU). Changes that were accepted, see
    ``accept_changes``, are recorded in the run's ``changes.jsonl``.

    A step whose gradient norm is not finite is left out: weights, optimizer and averages stay as they were. (With an
    optimizer of yours that cannot leave a step out, ``max_skipped_steps`` must be 0.) Such steps, and any whose loss is
    not finite, are counted on the device. The count is read whenever metrics or a checkpoint are written; more than
    ``max_skipped_steps`` of them stop the run before anything is saved.

    Started by torchrun, every process takes its rows of each batch and its share of the samples of an evaluation; the
    first alone writes the rest. A run may resume with another number of processes, which only changes what the network
    draws by itself, such as dropout. The folder must be in a file system that all of them see.

    Args:
        config: see :class:`~soflow_fast.TrainConfig`.
        model: to train instead of the configuration's: a network ``net(x, t, s, labels)`` with ``net.num_classes``; or
            an objective over one, such as :class:`~soflow_fast.SoFlow`, whose values replace the configuration's. A
            network told conditions other than classes has ``null_condition``, see :mod:`soflow_fast.conditions`.
        dataset: map-style, of (sample, label) or (sample, condition), to train on instead of the configuration's data;
            samples (C, H, W) floating point, or (2C, H, W) latent moments. validation: of the same form, instead of the
            configuration's, for the losses computed every ``output.validate_every`` steps.
        optimizer: instead of the configuration's, a function that makes a torch optimizer from the list of (name,
            parameter) that are trained and from ``lr``, such as ``functools.partial(torch.optim.SGD, momentum=0.9)``.
            As ``lr`` changes, the learning rates of its groups keep their ratios to it.
        accept_changes: resume a run whose configuration, data or trained parameters were others, where the weights
            fit, and record what changed.
        on_log: called in the first process with every line of ``metrics.jsonl`` as it is written, a mapping with the
            ``step``, such as ``wandb.log``; and with the path of each image grid, ``samples``. Its errors are warnings.

    Raises:
        ValueError: for a configuration that is impossible on this machine or does not fit the data.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: nn.Module | None = None,
        dataset: Dataset | None = None,
        validation: Dataset | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        accept_changes: bool = False,
        on_log: Callable[[dict], object] | None = None,
    ):
        self._on_log = on_log
        self._accept_changes, self._changes = accept_changes, []
        self._began = False
        config, model = given.with_given(config, model, dataset, optimizer, validation)
        config.require_effect()
        self.config = config
        device = build.resolve_device(config.device)
        if model is None and config.has_imported_objective:
            model = build.build_model(config)  # the user's code may not run on the meta device
        elif model is None:
            with torch.device("meta"):  # a value that cannot be is found before large weights are drawn
                planned = build.build_model(config)
        network = build.network_of(planned if model is None else model)
        if config.data.augment:
            Augment.check(network)
        null = null_condition(network)
        self.dataset = build.build_dataset(config, null) if dataset is None else dataset
        latent_scale = build.check_dataset(config, self.dataset, null)
        self.validation = build_validation(config, self.dataset, latent_scale, null, validation)
        chosen, n = config.output.sample_labels, math.prod(config.output.sample_shape)
        classes, setting = config.model.num_classes, f"output.sample_labels={list(chosen)}"
        self._grid_labels = labels_of_samples(network, self.dataset, chosen, n, classes, setting)
        if config.evaluation.every:
            check_evaluation(config)
        if config.output.keep_best and (why := why_unscored(config)):
            raise ValueError(f"output.keep_best=True keeps the best by its score, and there are none: {why}")
        self.processes = distributed.join(device)
        self.rows = self.processes.rows(config.batch_size)
        self.model = build.build_model(config, model)
        if model is not None:
            given.check(self.model, config, self.dataset)
            given.ensure_training_mode(self.model)
        self.model.to(self.processes.device)
        distributed.begin_alike(self.processes, self.model)  # before the averages begin with what it has
        wanted = config.optimizer
        self.optimizer = build.build_optimizer(config, self.model, optimizer)
        self._of_run = RunOptimizer(self.optimizer, self.model, wanted)
        self._given = of_given(config, self.model)
        self._frozen = Frozen(self.model, config.output.save_frozen)
        self.ema = EMA(self.model, config.ema.decay, config.ema.warmup)
        self.averages = [PowerEMA(self.model, std) for std in config.ema.posthoc]
        compute = {name: None if value == "auto" else value for name, value in asdict(config.compute).items()}
        self.step = TrainStep(
            self.model,
            optimizer=self.optimizer,
            ema=self.ema,
            averages=self.averages,
            total_steps=config.total_steps,
            seed=config.seed,
            accumulation=wanted.accumulation,
            grad_clip=wanted.grad_clip,
            latent_scale=latent_scale,
            augment=self._augmentation(),
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            **compute,
        )
        self.config = replace(config, compute=replace(config.compute, precision=self.step.precision))
        self.step.check_batch(self.rows.stop - self.rows.start)
        sizes = self.processes.device, (self.rows.stop - self.rows.start) // wanted.accumulation, self.step.precision
        recompute, _, self.on_device = memory.choose(config, self.model, self.dataset, *sizes)
        if config.model.is_dit:
            self.model.network.recompute = recompute
        self.workers = min(config.data.workers, len(os.sched_getaffinity(0)))
        self._decode = decoder_of(config.data, self.processes.device)
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / CHECKPOINTS

    def _augmentation(self) -> Augment | None:
        probability = self.config.data.augment
        return Augment(probability, self.model.network.num_classes, self.model.impl) if probability else None

    def fit(self) -> Path:
        """Trains to the last step, from the newest checkpoint of the run's folder if there is one.

        If a stop came before the validation, the sample grid or the score of that checkpoint's step, they are made
        first.

        Ctrl-C (once), SIGTERM, SIGUSR1 and SIGHUP, where this is the main thread, end it after the step, with several
        processes after the next that ten divides, with a checkpoint; their handlers are put back at the end.

        Returns:
            The path of the last checkpoint.

        Raises:
            ValueError: if the folder belongs to another configuration, model or data, or a process is training in it;
                nothing in it is changed. If this was interrupted before there was a checkpoint.
            FloatingPointError: after more steps that are not finite than the configuration allows.
            StoppedBySignal: a SystemExit, after such a signal; after Ctrl-C KeyboardInterrupt.
            Exception: what the data raised; in a process alone, after a checkpoint of the steps before.
        """
        with StopSignal() as stop, ExitStack() as self._until_the_end:
            return self._fit(stop)

    def _fit(self, stop: StopSignal) -> Path:
        config = self.config
        last_checkpoint = checkpoint.path_of(self.checkpoints, config.total_steps)
        null = null_condition(self.model.network)
        data = fingerprint(self.dataset, config.model.num_classes, null) if self.processes.is_first else None
        start, skipped = self._restore(data)
        origin = self._load_initial_weights() if start == 0 else None
        removed = self.processes.of_first(partial(self._claim_folder, start, data))
        validation = Validation(
            config, self.step, self.ema, self.validation, self.processes, self.workers, shield=stop.shield_workers
        )
        grids = Grids(config, self.model, self.ema, self._grid_labels, self.processes, self._decode)
        scoring = Scoring(config, self.model, self.ema, self.dataset, self.processes, self._decode)
        reports = validation, grids, scoring
        late = [report for report in reports if report.is_missing(start)]
        if start == config.total_steps and not (removed or late):
            return last_checkpoint
        log = Quiet()
        if self.processes.is_first:
            log = RunLog(self.run_dir, start, config.total_steps, config.batch_size, self._on_log)
        try:
            chosen = ", ".join(f"{name}={value}" for name, value in self.choices().items())
            log.say(f"data: {described(self.dataset, config.model.num_classes, null)}")
            if self.validation is not None:
                log.say(f"validation: {describe_validation(config, self.validation)}")
            if self._frozen.is_much:
                log.say(f"parameters: {self._frozen}")
            log.say(f"step {start} of {config.total_steps}: {chosen}")
            for change in self._changes:
                log.say(f"changed after step {start}: {change['key']} from {change['before']} to {change['after']}")
            if removed:
                log.say(f"removed the snapshots of steps beyond that: {', '.join(map(str, removed))}")
            if origin is not None:
                log.say(f"initial weights: {origin}")
            if self._decode is None and not are_images(config.model.in_channels):
                log.say("no autoencoder is set (data.vae), so samples stay latents: arrays in .npy files")
            if scoring.lacking:
                log.say(f"no evaluation during training: {scoring.lacking}")
            with log.off_the_clock():
                for report in late:
                    report(start, log)
            if start < config.total_steps:
                self._train(start, skipped, stop, log, reports)
        finally:
            log.close()
        return last_checkpoint

    def _train(self, start: int, skipped: int, stop: StopSignal, log: RunLog | Quiet, reports: tuple) -> None:
        config, output = self.config, self.config.output
        null, num_classes = null_condition(self.model.network), config.model.num_classes
        meter = Meter(self.processes, skipped)
        self._allowed = max(config.max_skipped_steps, 0 if can_leave_out(self.optimizer) else skipped)  # of before
        dataset, first = self.dataset, self.processes.is_first
        if self.on_device:
            dataset = load_resident(dataset, self.processes.device, num_classes, null_condition=null, show=first)
        steps = batches(
            dataset,
            batch=config.batch_size,
            steps=range(start, config.total_steps),
            seed=config.seed,
            num_classes=num_classes,
            rows=self.rows,
            workers=self.workers,
            prefetch=config.data.prefetch,
            device=self.processes.device,
            null_condition=null,
        )
        steps = stop.shield_workers(steps)
        draws = type(self.model.network) is not DiT or self._of_run.of_user
        place = {"rank": self.processes.rank, "world_size": self.processes.world_size}
        saved, longest = time.monotonic(), 60 * output.checkpoint_minutes or math.inf
        try:
            read = stopping.saving(steps, start, partial(self._save_early, meter, log))
            for done, (x, labels) in enumerate(read, start + 1):
                learning_rate, self._began = config.optimizer.learning_rate_at(done - 1, config.total_steps), True
                self._of_run.set_rate(learning_rate)
                with self._of_run.draws(config.seed, done, **place) if draws else nullcontext():
                    stats = self.step(x, labels)
                if done == start + 1 and self._of_run.of_user:
                    self._of_run.require_storable()
                meter.update(done, stats)
                log.advance()
                last = done == config.total_steps
                overdue = time.monotonic() - saved >= longest
                stopped, overdue = (0, False) if last else stop.agreed(self.processes, done, overdue)
                if last or stopped or due(done, output.log_every):
                    self._require_finite(meter)
                    log.write(done, {**meter.read(), "learning_rate": learning_rate})
                snapshots = self.averages and (last or due(done, config.ema.snapshot_every))
                saves = last or stopped or overdue or due(done, output.checkpoint_every)
                reported = [report for report in reports if report.is_due(done)]
                if not (snapshots or saves or reported):
                    continue
                skipped = self._require_finite(meter)  # waits for the device: steps that it had yet to do are timed
                with log.off_the_clock():
                    # Before a checkpoint: a run that goes on from it does not write the snapshots of its step again.
                    if snapshots:
                        self.processes.of_first(partial(self._write_snapshots, done))
                    if saves:
                        self.processes.of_first(partial(self._save, done, skipped))
                        saved = time.monotonic()
                    if stopped:  # what may take long is left to the run that goes on
                        log.say(stopping.sentence(stopped, done, checkpoint.path_of(self.checkpoints, done)))
                        raise stopping.ended_by(stopped)
                    for report in reported:
                        report(done, log)
        finally:
            steps.close()

    def choices(self) -> dict[str, object]:
        """What was left to the machine, by name."""
        return {
            "device": self.processes.device,
            "impl": self.model.impl,
            "attention": getattr(self.model.network, "attention", "the network's own"),
            "precision": self.step.precision,
            "compile": self.step.compile,
            "cuda_graph": self.step.cuda_graph,
            "recompute": getattr(self.model.network, "recompute", "the network's own"),
            "data": "on the device" if self.on_device else f"read by {self.workers} workers",
            "processes": self.processes.world_size,
        }

    def _load_initial_weights(self) -> str | None:
        """Starts network and averages from the weights of the configuration, if it has any; says what they are."""
        config, path = self.config, self.config.initial_weights
        if path is None:
            return None
        # one answer for all processes: a run that is given may just be writing another checkpoint
        path = self.processes.of_first(partial(weights.locate, path))
        with self._frozen.as_it_is(str(path)):
            origin = weights.load_weights(self.model, path, config.initial_weights_except, config.initial_weights_form)
        self.ema.load_state_dict(self.model.state_dict(), updates=0)
        return origin

    def _restore(self, data: dict[str, object] | None) -> tuple[int, int]:
        """Loads the newest checkpoint, if there is one; steps done and steps skipped."""
        path = self.processes.of_first(partial(self._newest_checkpoint, data))
        if path is None:
            if self._began:
                raise ValueError(
                    f"this Trainer was interrupted after step {int(self.step.step)}, and run_dir={str(self.run_dir)!r} "
                    "has no checkpoint to go on from; make a new Trainer, of a network that has not been trained"
                )
            return 0, 0
        if not path.is_dir():
            raise ValueError(
                f"process {self.processes.rank} does not see the checkpoint {path} of the first process; "
                "choose a run_dir in a file system that all processes share"
            )
        state = checkpoint.load(path, self.processes.device)
        run_folder.require_usable(state, self.config, path, self.ema.averages)
        checkpoint.load_weights(self.model, state.model, path)
        self._of_run.load_state_dict(state.optimizer)
        self.step.forget_graph()
        self.ema.load_state_dict({**self.model.state_dict(), **state.ema}, state.ema_updates)
        for average in self.averages:
            saved = {name: state.posthoc[f"{average.std}/{name}"] for name in average.averages}
            average.load_state_dict(saved, state.ema_updates)  # as many as the EMA's
        self.step.step.fill_(state.step)
        return state.step, state.skipped_steps

    def _newest_checkpoint(self, data: dict[str, object]) -> Path | None:
        made = self._of_run.made, self._given
        self._changes = run_folder.changes(self.run_dir, self.config, data, self._accept_changes, *made)
        *_, newest = [None, *checkpoint.committed(self.checkpoints)]
        self._changes += run_folder.changes_of_frozen(self.run_dir, newest, self._frozen, self._accept_changes)
        return newest

    def _claim_folder(self, step: int, data: dict[str, object]) -> list[int]:
        """The later steps that snapshots were of: what they belong to does not go on."""
        self._until_the_end.enter_context(run_folder.locked(self.run_dir))
        newest = self._newest_checkpoint(data)  # once more: until here another process may have trained
        if (checkpoint.step_of(newest) if newest else 0) != step:
            raise ValueError(
                f"run_dir={str(self.run_dir)!r} was trained in by another process while this one read its step {step}; "
                "give the same command again"
            )
        run_folder.claim(self.run_dir, self.config, data, self._changes, step, self._of_run.made, self._given)
        return posthoc.remove_after(self.run_dir, step)

    def _save(self, step: int, skipped: int) -> None:
        state = checkpoint.State(
            step=step,
            model=self._frozen.weights(),
            ema=self._frozen.averages(self.ema),
            posthoc={f"{one.std}/{name}": value for one in self.averages for name, value in one.averages.items()},
            optimizer=self._of_run.state_dict(),
            ema_updates=int(self.ema.updates),
            skipped_steps=skipped,
            frozen=self._frozen.hashes(),
        )
        checkpoint.save(self.checkpoints, state, self.config.output.keep_checkpoints, self.config.output.keep_every)

    def _write_snapshots(self, step: int) -> None:
        for average in self.averages:
            posthoc.save(self.run_dir, step, average)

    def _require_finite(self, meter: Meter) -> int:
        """How many steps were left out, if they are not too many."""
        return require_few(meter, self._allowed, self.config, self.dataset, can_leave_out(self.optimizer))

    def _save_early(self, meter: Meter, log: RunLog | Quiet, done: int) -> None:
        """Saves what the last whole step left, where the data of the next cannot be read.

        Not with several processes: the others are in the next step, and do not answer how many steps were left out.
        """
        path = checkpoint.path_of(self.checkpoints, done)
        if done == 0 or self.processes.world_size > 1 or path in checkpoint.committed(self.checkpoints):
            return
        skipped, values = self._require_finite(meter), meter.read()
        if values:
            rate = self.config.optimizer.learning_rate_at(done - 1, self.config.total_steps)
            log.write(done, {**values, "learning_rate": rate})
        self._save(done, skipped)
        log.say(f"the data of step {done + 1} cannot be read; step {done} is saved: {path}; the same command goes on")
