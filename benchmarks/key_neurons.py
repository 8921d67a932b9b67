"""Step time and state bytes of key-neuron training against dense AdamW, in one process, in alternation.

    python benchmarks/key_neurons.py [--ratio 0.05] [--masks random|change] [--rounds 7] [--threads 2] [--out FILE.json]

One step is forward, backward, clipping and a fused AdamW step, on the same batch, for a randomly initialised Llama (38 M parameters
by default). A round takes one step of each way, so whatever else the machine does slows all of them alike. Printed are medians,
their ratios to dense, and the bytes that a way keeps beside the weights that its forward reads.
"""
import argparse, copy, json, os, statistics, time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from maet.training import freeze, state_bytes

GOALS = dict(element=1.0, row=0.78)  # of dense step time
GRANULARITIES = ("element", "row", "column")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, value in dict(ratio=.05, rounds=7, threads=2, seed=0, hidden=512, intermediate=1408, layers=8, vocabulary=12000,
                            sequences=8, length=128).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--masks", choices=("random", "change"), default="random", help="key neurons at random, or by weight change after three dense steps")
    parser.add_argument("--granularities", nargs="+", choices=GRANULARITIES, default=GRANULARITIES)
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args()


def build(args):
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(LlamaConfig(hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.layers,
                                        num_attention_heads=args.hidden//64, num_key_value_heads=args.hidden//64, vocab_size=args.vocabulary,
                                        max_position_embeddings=args.length, use_cache=False))


class Way:
    "A model, its optimizer and the times of its steps."
    def __init__(self, model):
        self.model, self.seconds = model, []
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=.1, fused=True)

    def step(self, ids):
        start = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)


def random_masks(shapes, ratio, granularity):
    "Key neurons at random. A vector's scalars are rows, and columns, of their own."
    def lines(shape):
        if granularity == "element" or len(shape) == 1: return shape
        return (shape[0], 1) if granularity == "row" else (1, shape[1])
    return {name: (torch.rand(lines(shape)) < ratio).expand(shape) for name, shape in shapes.items()}


def changed_masks(model, ratio, granularity, ids):
    "The neurons that three dense steps move furthest (Eq. 1), over the whole model."
    from maet.neurons import importance, key_neurons, spread
    moved = Way(copy.deepcopy(model))
    for _ in range(3): moved.step(ids)
    after = dict(moved.model.named_parameters())
    scores = {name: importance(p.detach(), after[name].detach(), granularity) for name, p in model.named_parameters()}
    return {name: spread(mask, after[name].shape, granularity) for name, mask in key_neurons(scores, ratio).items()}


def measure(args):
    ids = torch.randint(args.vocabulary, (args.sequences, args.length))
    ways = dict(dense=Way(build(args)))
    for granularity in args.granularities:
        model = build(args)
        masks = (random_masks({n: p.shape for n, p in model.named_parameters()}, args.ratio, granularity) if args.masks == "random"
                 else changed_masks(model, args.ratio, granularity, ids))
        ways[granularity] = Way(freeze(model, masks))
    for _ in range(args.rounds + 1):  # the first round warms up
        for way in ways.values(): way.step(ids)
    return ways


def summary(name, way, dense):
    kept, own = state_bytes(way.model, way.optimizer), state_bytes(dense.model, dense.optimizer)
    median = lambda w: statistics.median(w.seconds[1:])
    return dict(way=name, seconds=median(way), time_ratio=median(way)/median(dense), bytes=kept,
                bytes_ratio=sum(kept.values())/sum(own.values()), trained=sum(p.numel() for p in way.model.parameters() if p.requires_grad),
                goal=GOALS.get(name), steps=way.seconds[1:])


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    ways = measure(args)
    rows = [summary(name, way, ways["dense"]) for name, way in ways.items()]
    for row in rows:
        goal = f"   goal {row['goal']}" if row["goal"] else ""
        print(f"{row['way']:8} {row['trained']/1e6:6.2f} M trained   step {row['seconds']:.3f} s = {row['time_ratio']:.3f} of dense{goal}"
              f"   state {sum(row['bytes'].values())/2**20:7.1f} MiB = {row['bytes_ratio']:.3f} of dense")
    if args.out:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.out.write_text(json.dumps(dict(settings=settings, torch=torch.__version__, cores=os.cpu_count(), rows=rows), indent=1) + "\n")


if __name__ == "__main__": main()
