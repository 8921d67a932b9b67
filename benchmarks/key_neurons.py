"""Step time and state bytes of key-neuron training against dense AdamW, in one process, in alternation.

    python benchmarks/key_neurons.py [--ratio 0.05] [--masks random|change] [--rounds 9] [--threads 2] [--out FILE.json]

One step is forward, backward, clipping and a fused AdamW step, on the same batch, for a randomly initialised Llama
(38 M parameters by default, the embedding and the head among them). A round takes one step of each way, so whatever else
the machine does slows all of them alike. Printed are the median step, its ratio to dense, the ratio of the best steps
(which a busy machine disturbs least), and the bytes that a way keeps beside the weights that its forward reads.
"""
import argparse, copy, json, os, statistics, time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from maet.training import freeze, state_bytes

GOALS = dict(element=1.0, row=0.78)  # of dense step time
GRANULARITIES = ("element", "row", "column")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    numbers = dict(ratio=.05, rounds=9, threads=2, seed=0, hidden=512, intermediate=1408, layers=8, vocabulary=12000,
                   sequences=4, length=128)
    for name, value in numbers.items(): parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--masks", choices=("random", "change"), default="random",
                        help="key neurons at random, or by weight change after three dense steps")
    parser.add_argument("--granularities", nargs="+", choices=GRANULARITIES, default=GRANULARITIES)
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args()


def build(args):
    torch.manual_seed(args.seed)
    heads = args.hidden//64
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.layers, use_cache=False,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=args.vocabulary, max_position_embeddings=args.length))


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


def sparse(args, granularity, ids):
    "The model with its key neurons."
    model = build(args)
    if args.masks == "change": masks = changed_masks(model, args.ratio, granularity, ids)
    else: masks = random_masks({n: p.shape for n, p in model.named_parameters()}, args.ratio, granularity)
    return freeze(model, masks)


def measure(args):
    ids = torch.randint(args.vocabulary, (args.sequences, args.length))
    ways = dict(dense=Way(build(args)))
    for granularity in args.granularities: ways[granularity] = Way(sparse(args, granularity, ids))
    for _ in range(args.rounds + 1):  # the first round warms up
        for way in ways.values(): way.step(ids)
    return ways


def summary(name, way, dense):
    kept, dense_kept = (state_bytes(w.model, w.optimizer) for w in (way, dense))
    times, dense_times = way.seconds[1:], dense.seconds[1:]
    return dict(way=name, trained=sum(p.numel() for p in way.model.parameters() if p.requires_grad),
                seconds=statistics.median(times), time_ratio=statistics.median(times)/statistics.median(dense_times),
                best_ratio=min(times)/min(dense_times), goal=GOALS.get(name), steps=times,
                bytes=kept, bytes_ratio=sum(kept.values())/sum(dense_kept.values()))


def told(row):
    goal = f" (goal {row['goal']})" if row["goal"] else ""
    return (f"{row['way']:8} {row['trained']/1e6:6.2f} M trained   step {row['seconds']:.3f} s = {row['time_ratio']:.3f} of dense"
            f"{goal}, best {row['best_ratio']:.3f}   state {sum(row['bytes'].values())/2**20:.1f} MiB = {row['bytes_ratio']:.3f} of dense")


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    ways = measure(args)
    rows = [summary(name, way, ways["dense"]) for name, way in ways.items()]
    print(*map(told, rows), sep="\n")
    if args.out:
        settings = vars(args) | dict(out=str(args.out), torch=torch.__version__, cores=os.cpu_count(), load=os.getloadavg()[0])
        args.out.write_text(json.dumps(dict(settings=settings, rows=rows), indent=1) + "\n")


if __name__ == "__main__": main()
