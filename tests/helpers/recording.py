"""Trains as scripts/train.py does, and writes down what each step saw and computed.

    python recording.py FOLDER REFERENCE [fields of a training run]

REFERENCE is another run's folder with a checkpoint of every step, or `-`. With it, every step is
also computed once from the other run's weights, so that differences do not add up over steps.
"""

import copy
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from first_stage.config import parse_config
from first_stage.training.checkpoint import checkpoint_folder, load_checkpoint
from first_stage.training.loop import train
from first_stage.training.step import Trainer


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def samples_of(trainer, batches):
    """Id, hash of the pixels (so of crop and flip) and hash of the noise of each sample."""
    return [
        [name, digest(pixels), digest(noise)]
        for batch in batches
        for name, pixels, noise in zip(batch.ids, batch.pixels, trainer.noise(batch), strict=True)
    ]


def averages(trainer):
    """Stands in for the model of averaged weights in `Trainer.restore`, which asks for them."""
    count = len(list(trainer.first_stage.network.model.parameters()))
    kept = [p.clone() for p in trainer.ema.shadow_params[:count]]
    return SimpleNamespace(parameters=lambda: kept)


class Recorder:
    """Wraps `Trainer.training_step`."""

    def __init__(self, folder, reference):
        self.folder, self.reference = Path(folder), reference
        self.folder.mkdir(parents=True, exist_ok=True)
        self.samples, self.gradients, self.collectives = {}, {}, {}
        self.kind = None

    def watch(self, trainer):
        """Note gradients as the optimizers take them: averaged over processes and clipped."""
        for name, player in {"first_stage": trainer.first_stage, "critic": trainer.critic}.items():

            def note(optimizer, *_, name=name):
                parameters = [p for g in optimizer.param_groups for p in g["params"]]
                found = [p.grad.flatten() for p in parameters if p.grad is not None]
                self.gradients[f"{self.kind}.{name}"] = torch.cat(found).clone()

            player.optimizer.register_step_pre_hook(note)

    def step(self, trainer, step, batches, original):
        if not hasattr(trainer, "recorded"):
            trainer.recorded = True
            self.watch(trainer)
        self.samples[step] = samples_of(trainer, batches)
        if self.reference is not None and step > 0:
            self.kind = f"{step}.forced"
            own = copy.deepcopy(trainer.snapshot(step))
            average = averages(trainer)
            theirs = load_checkpoint(checkpoint_folder(Path(self.reference), step))
            trainer.restore(theirs, averages(trainer))
            original(trainer, step, batches)
            trainer.restore(own, average)
        self.kind = f"{step}.free"
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            original(trainer, step, batches)
        self.collectives[step] = reduced.call_count  # beside the wrappers' own, of gradients
        self.save(trainer)

    def save(self, trainer):
        rank, world = trainer.processes.rank, trainer.processes.world
        (self.folder / f"samples-{rank}-of-{world}.json").write_text(json.dumps(self.samples))
        text = json.dumps(self.collectives)
        (self.folder / f"collectives-{rank}-of-{world}.json").write_text(text)
        save_file(self.gradients, self.folder / f"gradients-{rank}-of-{world}.safetensors")


def record(config, folder, reference=None):
    """Train with a recorder; returns the outcome."""
    recorder = Recorder(folder, reference)
    original = Trainer.training_step

    def training_step(trainer, step, batches):
        recorder.step(trainer, step, batches, original)

    Trainer.training_step = training_step
    try:
        return train(config)
    finally:
        Trainer.training_step = original


if __name__ == "__main__":
    folder, reference, *arguments = sys.argv[1:]
    record(parse_config(arguments), folder, None if reference == "-" else reference)
