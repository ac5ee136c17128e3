"""The loops that people write, on one process of several; writes down what each of them read."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from first_stage.errors import UserError
from latent_tools import BucketBatchSampler, LatentDataset, LatentStream

START = 7


def loop(accelerator, dataset, start=START):
    """The loop of the guide: a map-style data set behind `prepare`, from some epoch on."""
    loader = accelerator.prepare(DataLoader(dataset, batch_size=4, shuffle=True))
    for epoch in range(start, start + 2):
        dataset.set_epoch(epoch)
        for batch in loader:
            for name, latents in zip(batch["id"], batch["latents"], strict=True):
                yield epoch, name, latents.sum().item()


def refused(read):
    """What reading is refused with; empty when it is not."""
    try:
        for _ in read():
            pass
    except UserError as error:
        return str(error)
    return ""


def collate(items):
    """Tensors alone, which is what accelerate can send from process to process."""
    return {
        "latents": torch.stack([item["latents"] for item in items]),
        "number": torch.tensor([int(item["id"][-9:-4]) for item in items]),
    }


def streamed(accelerator, stream, dispatch):
    accelerator.dataloader_config = DataLoaderConfiguration(dispatch_batches=dispatch)
    loader = accelerator.prepare(DataLoader(stream, batch_size=2, collate_fn=collate))
    return [number for batch in loader for number in batch["number"].tolist()]


def sampled(accelerator, dataset, dispatch, **named):
    accelerator.dataloader_config = DataLoaderConfiguration(dispatch_batches=dispatch)
    sampler = BucketBatchSampler(dataset, 2, **named)
    return accelerator.prepare(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate))


def stateful(accelerator, dataset, dispatch=False):
    """A loader that keeps states, of batches that a sampler of ours makes."""
    accelerator.dataloader_config = DataLoaderConfiguration(
        dispatch_batches=dispatch, use_stateful_dataloader=True
    )
    sampler = BucketBatchSampler(dataset, 2, rank=0, world=1, drop_last=True)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2, collate_fn=collate)
    loader = accelerator.prepare(loader)
    sampler.set_epoch(START)
    return loader


def resumed(accelerator, cache, folder):
    """What is read in an epoch that is broken off after a batch, and after a restart."""
    loader = stateful(accelerator, LatentDataset(cache, flip=0.0))
    accelerator._dataloaders[:] = [loader]
    batches = iter(loader)
    first = next(batches)
    accelerator.save_state(folder)
    loader = stateful(accelerator, LatentDataset(cache, flip=0.0))
    accelerator._dataloaders[:] = [loader]
    accelerator.load_state(folder)
    return [
        (number, total)
        for batch in (first, *loader)
        for number, total in zip(
            batch["number"].tolist(), batch["latents"].sum((1, 2, 3)).tolist(), strict=True
        )
    ]


def told_too_late(accelerator, dataset):
    """A loop whose sampler accelerate tells the epoch, and not the data set."""
    accelerator.dataloader_config = DataLoaderConfiguration(
        use_stateful_dataloader=True, use_seedable_sampler=True, data_seed=0
    )
    began = torch.multiprocessing.Event()

    def collate_and_say_so(items):
        began.set()
        return collate(items)

    loader = accelerator.prepare(
        DataLoader(
            dataset, batch_size=1, shuffle=True, num_workers=1, collate_fn=collate_and_say_so
        )
    )
    assert began.wait(60)
    dataset.set_epoch(START)
    yield from loader


def streamed_with_states(accelerator, stream):
    accelerator.dataloader_config = DataLoaderConfiguration(use_stateful_dataloader=True)
    loader = DataLoader(stream, batch_size=2, num_workers=2, collate_fn=collate)
    yield from accelerator.prepare(loader)


def main(cache: str, buckets: str, output: str) -> None:
    accelerator = Accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    dataset = LatentDataset(cache, flip=0.0)
    mine = list(loop(accelerator, dataset))
    shared = LatentStream(dataset, rank=rank, world=world)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    steps = []
    shared.set_epoch(0)
    for batch in DataLoader(shared, batch_size=2):  # as in the guide: not prepared
        model(batch["latents"].mean((1, 2, 3))[:, None]).sum().backward()
        steps += batch["id"]
    found = {
        "world": world,
        "loop": mine,
        "steps": steps,
        "whole": {d: streamed(accelerator, LatentStream(dataset), d) for d in (True, False)},
        "refused": [
            refused(lambda d=d: streamed(accelerator, shared, d)) for d in (True, False)
        ]
        + [refused(lambda d=d: sampled(accelerator, dataset, d)) for d in (True, False)],
        "resumed": resumed(accelerator, cache, f"{output}-state"),
        "dispatched": [
            refused(lambda: stateful(accelerator, LatentDataset(cache), dispatch=True)),
            refused(lambda: streamed_with_states(accelerator, LatentStream(LatentDataset(cache)))),
        ],
        "late": refused(lambda: told_too_late(accelerator, LatentDataset(cache))),
        "joined": refused(
            lambda: sampled(
                accelerator, LatentDataset(buckets), True, rank=0, world=1, drop_last=True
            )
        ),
    }  # fmt: skip
    Path(f"{output}{rank}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
