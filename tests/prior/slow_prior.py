"""The prior once more, slow and obvious: one sample, one unit at a time, in plain loops from the definition of its order."""

import math

import torch

from tests.prior.test_sequence import slow_order, slow_units


def slow_nats(prior, codes, condition, frames=None, window=None):
    """-ln p of every code of one sample, as a dict {(level, codebook, place): nats}, and of "is there one more frame", in a list.

    Args:
        codes: all levels, each (1, Q, *grid), of no more than the sample's own length.
        condition: ids.
        frames: how many coarse frames a time series that ends by itself has.
        window: (first unit, last unit) that the transformer sees; None for all.
    """
    config, vocabulary = prior.config, prior.vocabulary
    first = config.first_level
    ids = {}
    for level, values in enumerate(vocabulary.to_ids(codes)):
        for q in range(values.shape[1]):
            for at in torch.ones(values.shape[2:]).nonzero().tolist():
                ids[level, q, tuple(at)] = int(values[(0, q, *at)])
    shapes = [tuple(values.shape[1:]) for values in vocabulary.to_ids(codes)]
    grid = shapes[0][1:]
    own = [shape for level, shape in enumerate(shapes) if level >= first][: config.num_levels]
    if frames is not None:  # a table that goes on for a while
        more = frames + max(shape[0] for shape in own) + 1
        own = [(shape[0], more * shape[1] // own[0][1]) for shape in own]
    rows = slow_order(own, config.order, config.stops)
    units = slow_units(own, config.order, rows)
    shifted = config.order in ("flat", "delay", "depth")
    embed = prior.get_input_embeddings().weight

    def place(tables, level, q, at):
        ratio = config.ratios[level]
        return tables.level.weight[level] + tables.codebook.weight[q] + sum(
            table.weight[n * ratio] for table, n in zip(tables.coords, at, strict=True)
        )  # fmt: skip

    def special(tables, axis):
        nowhere = sum(table.weight[config.extent] for table in tables.coords)
        return tables.level.weight[len(config.layout["levels"])] + tables.codebook.weight[axis] + nowhere

    begin = embed[vocabulary.special_id("begin")] + special(prior.place_embed, 0)
    prefix = [begin]
    if not config.stops:
        for axis, extent in enumerate(grid):
            prefix[-1] = prefix[-1] + special(prior.next_place_embed, axis)
            prefix.append(embed[vocabulary.size_offset + extent - 1] + special(prior.place_embed, axis))
    tokens = [embed[i] for i in condition] + prefix
    steps = list(range(-len(tokens), 0))
    given = given_maps(prior, codes, own) if first else None

    def missing(code):
        return frames is not None and code[2][0] * own[0][1] // own[code[0]][1] >= frames

    step_of = {row[1:]: row[0] for row in rows}
    index_of = {}
    for number, (targets, sources) in enumerate(units):
        x = torch.zeros_like(embed[0])
        for level, q, at in targets:
            x = x + place(prior.next_place_embed, level + first, q, at)
            if given is not None:
                x = x + given[level][at]
        for level, q, at in sources:
            if not missing((level, q, at)):
                x = x + embed[ids[level + first, q, at]] + place(prior.place_embed, level + first, q, at)
        if shifted and number == 0:
            tokens[-1] = tokens[-1] + x
            index_of[0] = len(tokens) - 1
        elif window is None or window[0] <= number < window[1]:
            index_of[number] = len(tokens)
            tokens.append(x)
            steps.append(step_of[next(iter(targets))])
    bias = torch.zeros(len(tokens), len(tokens))
    for i, a in enumerate(steps):
        for j, b in enumerate(steps):
            if b > a:
                bias[i, j] = torch.finfo(torch.float32).min
    start = config.prefix_length - len(condition)
    hidden = prior.backbone(
        inputs_embeds=torch.stack(tokens)[None],
        attention_mask=bias[None, None],
        position_ids=torch.arange(start, start + len(tokens))[None],
    ).last_hidden_state[0]

    nats, ends = {}, []
    for number, (targets, _) in enumerate(units):
        if number not in index_of or (window is not None and number == 0 and window[0] > 0):
            continue
        h = hidden[index_of[number]]
        if frames is not None:
            at = [place for level, q, place in targets if (level, q) == (0, 0)]
            if at and 0 < at[0][0] <= frames:
                p = torch.sigmoid(prior.end_head(h)[0].double())
                ends.append(-math.log(p if at[0][0] == frames else 1 - p))
        for level, q, at in sorted(targets, key=lambda code: code[1]):
            if missing((level, q, at)):
                continue
            x = h
            if config.order == "depth":
                x = slow_depth(prior, h, level + first, q, at, ids)
            offset, size = prior._streams[level + first, q]
            logits = prior.lm_head(x)[offset - vocabulary.size_offset :][:size]
            nats[level, q, at] = -float(logits.double().log_softmax(0)[ids[level + first, q, at] - offset])
    return nats, ends


def slow_depth(prior, h, level, q, at, ids):
    """What codebook q of a place is predicted from: the small transformer over the codebooks before it, without a cache."""
    names = sorted(prior._streams)
    tokens = []
    for before in range(q + 1):
        x = h + prior.depth_embed.weight[names.index((level, before))]
        if before:
            x = x + prior.get_input_embeddings().weight[ids[level, before - 1, at]]
        tokens.append(x)
    return prior.depth(inputs_embeds=torch.stack(tokens)[None]).last_hidden_state[0, -1]


def given_maps(prior, codes, own):
    """What given levels say about each place of each predicted level, in plain loops around the stacks' own layers."""
    x = None
    for level, values in enumerate(prior.vocabulary.to_ids(codes)[: prior.config.first_level]):
        here = torch.zeros(1, prior.config.backbone_config.hidden_size, *values.shape[2:])
        for at in torch.ones(values.shape[2:]).nonzero().tolist():
            for q in range(values.shape[1]):
                here[(0, slice(None), *at)] += (
                    prior.get_input_embeddings().weight[int(values[(0, q, *at)])]
                    + prior.place_embed.level.weight[level]
                    + prior.place_embed.codebook.weight[q]
                )
        if x is not None:
            here = here + repeated(x, here.shape[2:])
        x = here
        for block in prior.conditioner.stacks[level]:
            x = block(x)
    maps = []
    for shape in own:
        big = repeated(x, shape[1:])
        places = torch.ones(shape[1:]).nonzero().tolist()
        maps.append({tuple(at): big[(0, slice(None), *at)] for at in places})
    return maps


def repeated(x, grid):
    """Each cell of x (1, M, *coarse) as often as the finer grid has cells in it."""
    out = torch.zeros(1, x.shape[1], *grid)
    for at in torch.ones(tuple(grid)).nonzero().tolist():
        coarse = [n * small // big for n, small, big in zip(at, x.shape[2:], grid, strict=True)]
        out[(0, slice(None), *at)] = x[(0, slice(None), *coarse)]
    return out
