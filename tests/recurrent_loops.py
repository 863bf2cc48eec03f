"""The recurrent models once more, in float64, a number at a time, from the papers' formulas."""

import math

import torch
from torch import Tensor


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def softmax(x: list[float]) -> list[float]:
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def times(weight: Tensor, x: list[float], bias: Tensor | None = None) -> list[float]:
    rows = weight.double().tolist()
    b = [0.0] * len(rows) if bias is None else bias.double().tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + c for row, c in zip(rows, b, strict=True)]


def lstm(x, h, c, w_x, w_h, b_x, b_h):
    """i, f, g, o; c' = f c + i g; h' = o tanh(c')."""
    z = [a + b for a, b in zip(times(w_x, x, b_x), times(w_h, h, b_h), strict=True)]
    n = len(h)
    c = [sigmoid(z[n + j]) * c[j] + sigmoid(z[j]) * math.tanh(z[2 * n + j]) for j in range(n)]
    return [sigmoid(z[3 * n + j]) * math.tanh(c[j]) for j in range(n)], c


def gru(x, h, w_x, w_h, b_x, b_h):
    """r, z; n = tanh(W x + b + r (U h + b')); h' = (1 - z) n + z h."""
    a, b, n = times(w_x, x, b_x), times(w_h, h, b_h), len(h)
    out = []
    for j in range(n):
        r, z = sigmoid(a[j] + b[j]), sigmoid(a[n + j] + b[n + j])
        new = math.tanh(a[2 * n + j] + r * b[2 * n + j])
        out.append((1 - z) * new + z * h[j])
    return out


def head(numbers, slots, before):
    """A head's weights: content, interpolation, shift, sharpening."""
    num, width = len(slots), len(slots[0])
    key = [math.tanh(v) for v in numbers[:width]]
    strength, gate = softplus(numbers[width]), sigmoid(numbers[width + 1])
    shift, sharpness = softmax(numbers[width + 2 : width + 5]), 1 + softplus(numbers[width + 5])
    squares = sum(v * v for v in key) + 1e-4
    similar = [
        strength
        * sum(a * b for a, b in zip(key, slot, strict=True))
        / math.sqrt(squares * (sum(v * v for v in slot) + 1e-4))
        for slot in slots
    ]
    content = softmax(similar)
    kept = [gate * content[i] + (1 - gate) * before[i] for i in range(num)]
    # shift[0] moves the head down a slot, shift[2] up.
    moved = [sum(shift[k + 1] * kept[(i - k) % num] for k in (-1, 0, 1)) for i in range(num)]
    sharp = [(v + 1e-8) ** sharpness for v in moved]
    return [v / sum(sharp) for v in sharp]


def memory(numbers, slots, read, write):
    """Write, then read: slots, both heads' weights, what was read."""
    width = len(slots[0])
    parts = [width + 6, width + 6, width, width, 1]
    ends = [sum(parts[: i + 1]) for i in range(5)]
    of_read, of_write, erase, add, gate = (numbers[e - p : e] for e, p in zip(ends, parts, strict=True))
    write = head(of_write, slots, write)
    slots = [
        [
            slots[i][j] * (1 - sigmoid(gate[0]) * write[i] * sigmoid(erase[j]))
            + sigmoid(gate[0]) * write[i] * math.tanh(add[j])
            for j in range(width)
        ]
        for i in range(len(slots))
    ]
    read = head(of_read, slots, read)
    value = [sum(read[i] * slots[i][j] for i in range(len(slots))) for j in range(width)]
    return slots, read, write, value


def hidden_states(model, ids: list[int]) -> Tensor:
    """(T, D) of one row, by the config's cells, the last with a memory where there are slots."""
    config, size = model.config, model.config.hidden_size
    xs = [model.get_input_embeddings().weight[i].double().tolist() for i in ids]
    for layer in model.get_decoder().layers:
        with_memory, out = hasattr(layer, "interface"), []
        cell = layer.cell
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [getattr(cell, name + ("" if with_memory else "_l0")) for name in names]
        h = c = [0.0] * size
        num, width = config.memory_slots, config.memory_width
        slots, value = [[0.0] * width for _ in range(num)], [0.0] * width
        read = write = [1.0] + [0.0] * (num - 1)
        for x in xs:
            x = x + value if with_memory else x
            if config.cell == "lstm":
                h, c = lstm(x, h, c, *weights)
            else:
                h = gru(x, h, *weights)
            if not with_memory:
                out.append(h)
                continue
            numbers = times(layer.interface.weight, h, layer.interface.bias)
            slots, read, write, value = memory(numbers, slots, read, write)
            out.append([a + b for a, b in zip(h, times(layer.value.weight, value), strict=True)])
        xs = out
    return torch.tensor(xs, dtype=torch.float64)
