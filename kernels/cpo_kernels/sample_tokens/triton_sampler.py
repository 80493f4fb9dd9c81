# mypy: disable-error-code="no-untyped-def"
"""Sampling in Triton by three launches and without a sort. All arithmetic is float64.

    maxima   of every block of a row: largest raw logit, largest score (penalised logit) and its id
    masses   of every block: sum exp(raw - max), sum p with p = exp((score - max) / temperature), and how many tokens, of
             which mass, lie above each of a few levels
    choose   a row: where nothing is cut off, the block and then the token in which the cumulative mass passes u

Where top-k or top-p cut, the tokens of the highest level that surely holds what they keep are listed in the order of
their ids: a few of a peaked row, all of a flat one. On the list, the k-th largest score and the smallest kept probability
are found by bisection over the bits of the numbers, whose interval shrinks to values that occur. Of equal probabilities at
the edge of the nucleus the smaller ids stay, as in a stable sort.

Loops end by the data of a row, on the device, so one recorded launch serves every row.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # logits of a program, and listed tokens in one step of a loop
NUM_WARPS = 8
LEVELS = 16
LEVEL_STEP = 0.75  # nats below the largest score, at temperature 1, from level to level. The last level holds all
# float64 sums in two orders differ by less. A level whose mass is within it of what is wanted may not hold all of it
SLACK = 1e-9
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}  # numbers are compared that several kernels compute


def sample_tokens_triton(
    logits: torch.Tensor,  # [B, V] float32, rows contiguous
    uniforms: torch.Tensor | None,  # [B, S] float64
    step: torch.Tensor,  # [B] int64
    temperature: torch.Tensor,  # [B] float64
    top_p: torch.Tensor | None,  # [B] float64
    top_k: torch.Tensor | None,  # [B] int64
    penalty: torch.Tensor | None,  # [B] float64
    seen: torch.Tensor | None,  # [B, V] bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] int64 and raw log-probs [B] float64."""
    (num_rows, vocab), device = logits.shape, logits.device
    num_blocks = triton.cdiv(vocab, BLOCK)
    draws, cuts = uniforms is not None, uniforms is not None and (top_p is not None or top_k is not None)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    logps = torch.empty(num_rows, dtype=torch.float64, device=device)
    raw_max, score_max, raw_sum, mass = torch.empty(4, num_rows, num_blocks, dtype=torch.float64, device=device)
    best = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=device)
    level_mass = torch.empty(num_rows, num_blocks, LEVELS if cuts else 0, dtype=torch.float64, device=device)
    level_count = torch.empty(level_mass.shape, dtype=torch.int32, device=device)
    listed = torch.empty(num_rows, vocab if cuts else 0, dtype=torch.int32, device=device)
    if num_rows == 0:
        return tokens, logps
    flags = None if seen is None else seen.view(torch.uint8)
    sizes = (vocab, logits.stride(0))
    constants = {"HAS_PENALTY": penalty is not None, "BLOCK": BLOCK}
    blocks = {"BLOCKS": triton.next_power_of_2(num_blocks), "LEVELS": LEVELS, "LEVEL_STEP": LEVEL_STEP}
    _block_maxima[(num_rows, num_blocks)](
        logits, penalty, flags, raw_max, score_max, best, *sizes, **constants, **OPTIONS
    )
    _block_masses[(num_rows, num_blocks)](
        logits, penalty, flags, temperature, raw_max, score_max, raw_sum, mass, level_mass, level_count, *sizes,
        DRAWS=draws, CUTS=cuts, **constants, **blocks, **OPTIONS,
    )  # fmt: skip
    _choose[(num_rows,)](
        logits, penalty, flags, uniforms, step, temperature, top_p, top_k, raw_max, score_max, raw_sum, mass, best,
        level_mass, level_count, listed, tokens, logps, *sizes, 0 if uniforms is None else uniforms.shape[1],
        DRAWS=draws, HAS_TOP_P=top_p is not None, HAS_TOP_K=top_k is not None, SLACK=SLACK,
        **constants, **blocks, **OPTIONS,
    )  # fmt: skip
    return tokens, logps


@triton.jit
def _load_raw(logits_ptr, ids, real):
    """Raw logits as float64, NaN as +inf, which is refused alike."""
    raw = tl.load(logits_ptr + ids, mask=real, other=float("-inf")).to(tl.float64)
    return tl.where(raw != raw, float("inf"), raw)


@triton.jit
def _scores(raw, seen_ptr, penalty, ids, real, HAS_PENALTY: tl.constexpr):
    """Logits after the repetition penalty."""
    if HAS_PENALTY:
        seen = tl.load(seen_ptr + ids, mask=real, other=0) != 0
        return tl.where(seen, tl.where(raw < 0, raw * penalty, raw / penalty), raw)
    else:
        return raw


@triton.jit
def _row_penalty(penalty_ptr, seen_ptr, row, vocab, HAS_PENALTY: tl.constexpr):
    """A row's penalty and its flags."""
    if HAS_PENALTY:
        return tl.load(penalty_ptr + row), seen_ptr + row * vocab
    else:
        return tl.full([], 1.0, tl.float64), seen_ptr


@triton.jit
def _block_maxima(
    logits_ptr,  # [B, V]
    penalty_ptr,  # [B] fp64
    seen_ptr,  # [B, V] uint8
    raw_max_ptr,  # [B, NB] fp64
    score_max_ptr,  # [B, NB] fp64
    best_ptr,  # [B, NB] int32
    vocab, row_stride,
    HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Maxima of one block, and the smallest id that has the largest score."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = ids < vocab
    penalty, seen_row_ptr = _row_penalty(penalty_ptr, seen_ptr, row, vocab, HAS_PENALTY)
    raw = _load_raw(logits_ptr + row * row_stride, ids, real)
    scores = _scores(raw, seen_row_ptr, penalty, ids, real, HAS_PENALTY)
    largest = tl.max(scores, 0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(raw_max_ptr + place, tl.max(raw, 0))
    tl.store(score_max_ptr + place, largest)
    tl.store(best_ptr + place, tl.min(tl.where((scores == largest) & real, ids, vocab - 1), 0))


@triton.jit
def _block_masses(
    logits_ptr,  # [B, V]
    penalty_ptr,  # [B] fp64
    seen_ptr,  # [B, V] uint8
    temperature_ptr,  # [B] fp64
    raw_max_ptr,  # [B, NB] fp64
    score_max_ptr,  # [B, NB] fp64
    raw_sum_ptr,  # [B, NB] fp64
    mass_ptr,  # [B, NB] fp64
    level_mass_ptr,  # [B, NB, LEVELS] fp64
    level_count_ptr,  # [B, NB, LEVELS] int32
    vocab, row_stride,
    DRAWS: tl.constexpr, CUTS: tl.constexpr, HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    LEVELS: tl.constexpr, LEVEL_STEP: tl.constexpr,
):  # fmt: skip
    """Masses of one block, against the maxima of its row."""
    row = tl.program_id(0).to(tl.int64)
    num_blocks = tl.num_programs(1)
    place = row * num_blocks + tl.program_id(1)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = ids < vocab
    blocks = tl.arange(0, BLOCKS)
    others, is_block = row * num_blocks + blocks, blocks < num_blocks
    raw = _load_raw(logits_ptr + row * row_stride, ids, real)
    raw_max = tl.max(tl.load(raw_max_ptr + others, mask=is_block, other=float("-inf")), 0)
    tl.store(raw_sum_ptr + place, tl.sum(tl.where(real, tl.exp(raw - raw_max), 0.0), 0))
    if DRAWS:
        penalty, seen_row_ptr = _row_penalty(penalty_ptr, seen_ptr, row, vocab, HAS_PENALTY)
        scores = _scores(raw, seen_row_ptr, penalty, ids, real, HAS_PENALTY)
        largest = tl.max(tl.load(score_max_ptr + others, mask=is_block, other=float("-inf")), 0)
        depth = (scores - largest) / _divisor(temperature_ptr, row)
        p = tl.where(real, tl.exp(depth), 0.0)
        tl.store(mass_ptr + place, tl.sum(p, 0))
        if CUTS:
            levels = tl.arange(0, LEVELS)
            inside = (depth[:, None] >= _floor(levels, LEVELS, LEVEL_STEP)[None, :]) & real[:, None]
            tl.store(level_mass_ptr + place * LEVELS + levels, tl.sum(tl.where(inside, p[:, None], 0.0), 0))
            tl.store(level_count_ptr + place * LEVELS + levels, tl.sum(inside.to(tl.int32), 0))


@triton.jit
def _divisor(temperature_ptr, row):
    """A row's temperature, 1 for a greedy row, whose draw is not read."""
    temperature = tl.load(temperature_ptr + row)
    return tl.where(temperature > 0.0, temperature, 1.0)


@triton.jit
def _floor(level, LEVELS: tl.constexpr, LEVEL_STEP: tl.constexpr):
    """(score - largest) / temperature down to which tokens belong to a level."""
    return tl.where(level == LEVELS - 1, float("-inf"), (level + 1).to(tl.float64) * -LEVEL_STEP)


@triton.jit
def _choose(
    logits_ptr,  # [B, V]
    penalty_ptr,  # [B] fp64
    seen_ptr,  # [B, V] uint8
    uniforms_ptr,  # [B, S] fp64
    step_ptr,  # [B] int64
    temperature_ptr,  # [B] fp64
    top_p_ptr,  # [B] fp64
    top_k_ptr,  # [B] int64
    raw_max_ptr,  # [B, NB] fp64
    score_max_ptr,  # [B, NB] fp64
    raw_sum_ptr,  # [B, NB] fp64
    mass_ptr,  # [B, NB] fp64
    best_ptr,  # [B, NB] int32
    level_mass_ptr,  # [B, NB, LEVELS] fp64
    level_count_ptr,  # [B, NB, LEVELS] int32
    listed_ptr,  # [B, V] int32
    tokens_ptr,  # [B] int64
    logps_ptr,  # [B] fp64
    vocab, row_stride, num_uniforms,
    DRAWS: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_TOP_K: tl.constexpr, SLACK: tl.constexpr,
    HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LEVELS: tl.constexpr,
    LEVEL_STEP: tl.constexpr,
):  # fmt: skip
    """One row's token and its raw log-prob."""
    row = tl.program_id(0).to(tl.int64)
    num_blocks = tl.cdiv(vocab, BLOCK)
    blocks = tl.arange(0, BLOCKS)
    here, real = row * num_blocks + blocks, blocks < num_blocks
    penalty, seen_row_ptr = _row_penalty(penalty_ptr, seen_ptr, row, vocab, HAS_PENALTY)
    logits_row_ptr = logits_ptr + row * row_stride
    raw_max = tl.max(tl.load(raw_max_ptr + here, mask=real, other=float("-inf")), 0)
    score_maxima = tl.load(score_max_ptr + here, mask=real, other=float("-inf"))
    largest = tl.max(score_maxima, 0)
    best = tl.load(best_ptr + here, mask=real, other=0)
    token = tl.min(tl.where(real & (score_maxima == largest), best, vocab - 1), 0)  # greedy
    finite = (raw_max > float("-inf")) & (raw_max < float("inf"))
    if DRAWS:  # noqa: SIM102 (known when the kernel is compiled)
        if finite & (tl.load(temperature_ptr + row) > 0.0):
            divisor = _divisor(temperature_ptr, row)
            masses = tl.load(mass_ptr + here, mask=real, other=0.0)
            taken = tl.minimum(tl.load(step_ptr + row), num_uniforms - 1)  # at its cap a row has no number left
            uniform = tl.load(uniforms_ptr + row * num_uniforms + taken)
            # 1 and V cut nothing
            top_p = tl.full([], 1.0, tl.float64)
            top_k = tl.cast(vocab, tl.int64)
            if HAS_TOP_P:
                top_p = tl.load(top_p_ptr + row)
            if HAS_TOP_K:
                top_k = tl.load(top_k_ptr + row)
            if (top_p < 1.0) | (top_k < vocab):
                at_levels = here[:, None] * LEVELS + tl.arange(0, LEVELS)[None, :]
                level_masses = tl.sum(tl.load(level_mass_ptr + at_levels, mask=real[:, None], other=0.0), 0)
                level_counts = tl.sum(tl.load(level_count_ptr + at_levels, mask=real[:, None], other=0), 0)
                wanted_mass = top_p * tl.sum(masses, 0) * (1.0 + SLACK)
                # what top-p keeps of what top-k keeps is held by a level that holds k tokens
                enough = tl.where(top_k < vocab, level_counts >= top_k, level_masses >= wanted_mass)
                levels = tl.arange(0, LEVELS)
                level = tl.min(tl.where(enough, levels, LEVELS - 1), 0)
                floor = _floor(level, LEVELS, LEVEL_STEP)
                listed_row_ptr = listed_ptr + row * vocab
                count = _list_above(
                    floor, logits_row_ptr, seen_row_ptr, penalty, score_max_ptr + row * num_blocks, largest, divisor,
                    listed_row_ptr, vocab, num_blocks, HAS_PENALTY, BLOCK,
                )  # fmt: skip
                token = _draw_listed(
                    listed_row_ptr, count, logits_row_ptr, seen_row_ptr, penalty, largest, divisor, tl.sum(masses, 0),
                    top_p, top_k, uniform, vocab, HAS_PENALTY, BLOCK,
                )  # fmt: skip
            else:
                token = _draw_any(
                    masses, uniform, logits_row_ptr, seen_row_ptr, penalty, largest, divisor, vocab,
                    HAS_PENALTY, BLOCK, BLOCKS,
                )  # fmt: skip
    raw_total = tl.sum(tl.load(raw_sum_ptr + here, mask=real, other=0.0), 0)
    chosen = tl.load(logits_row_ptr + token).to(tl.float64)
    tl.store(logps_ptr + row, chosen - raw_max - tl.log(raw_total))
    tl.store(tokens_ptr + row, tl.where(finite, token, -1).to(tl.int64))
    if HAS_PENALTY:
        tl.store(seen_row_ptr + token, tl.full([], 1, tl.uint8))


@triton.jit
def _draw_any(
    masses, uniform, logits_ptr, seen_ptr, penalty, largest, divisor, vocab,
    HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """First token, of all, whose cumulative mass exceeds the uniform number times the whole."""
    blocks = tl.arange(0, BLOCKS)
    wanted = uniform * tl.sum(masses, 0)
    # masses of 0 are passed by, because a scan in parallel may round down from one place to the next
    block = tl.min(tl.where((tl.cumsum(masses, 0) > wanted) & (masses > 0.0), blocks, BLOCKS), 0)
    block = tl.minimum(block, tl.max(tl.where(masses > 0.0, blocks, 0), 0))
    before = tl.sum(tl.where(blocks < block, masses, 0.0), 0)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    real = ids < vocab
    scores = _scores(_load_raw(logits_ptr, ids, real), seen_ptr, penalty, ids, real, HAS_PENALTY)
    p = tl.where(real, tl.exp((scores - largest) / divisor), 0.0)
    some = p > 0.0
    first = tl.min(tl.where((before + tl.cumsum(p, 0) > wanted) & some, ids, vocab), 0)
    return tl.minimum(first, tl.max(tl.where(some, ids, 0), 0))


@triton.jit
def _list_above(
    floor, logits_ptr, seen_ptr, penalty, score_max_ptr, largest, divisor, listed_ptr, vocab, num_blocks,
    HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the ids of a level's tokens, ascending, and return how many there are."""
    count = tl.full([], 0, tl.int32)
    for block in range(num_blocks):
        if (tl.load(score_max_ptr + block) - largest) / divisor >= floor:
            ids = block * BLOCK + tl.arange(0, BLOCK)
            real = ids < vocab
            scores = _scores(_load_raw(logits_ptr, ids, real), seen_ptr, penalty, ids, real, HAS_PENALTY)
            inside = (real & ((scores - largest) / divisor >= floor)).to(tl.int32)
            tl.store(listed_ptr + count + tl.cumsum(inside, 0) - 1, ids, mask=inside > 0)
            count += tl.sum(inside, 0)
    tl.debug_barrier()  # other threads of this program read what was written
    return count


@triton.jit
def _load_listed(
    first, count, listed_ptr, logits_ptr, seen_ptr, penalty, largest, divisor,
    HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of the list: ids, which of them are real, their scores and probabilities."""
    places = first + tl.arange(0, BLOCK)
    real = places < count
    ids = tl.load(listed_ptr + places, mask=real, other=0)
    scores = _scores(_load_raw(logits_ptr, ids, real), seen_ptr, penalty, ids, real, HAS_PENALTY)
    return ids, real, scores, tl.where(real, tl.exp((scores - largest) / divisor), 0.0)


@triton.jit
def _key(x):
    """Integers in the order of float64 numbers, -0 just below 0."""
    bits = x.to(tl.int64, bitcast=True)
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


@triton.jit
def _edge(
    wanted, least, low, high, listed_ptr, count, logits_ptr, seen_ptr, penalty, largest, divisor,
    BY_MASS: tl.constexpr, HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Key of the largest value (probability by mass, else score) from which on up at least `wanted` lies.

    `low` and `high` are keys: at least so much lies from low on up, less from high on up.
    """
    while low + 1 < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # their sum may exceed 64 bits
        found = tl.full([], 0.0, tl.float64)
        above = high
        below = low
        for first in range(0, count, BLOCK):
            _ids, real, scores, p = _load_listed(
                first, count, listed_ptr, logits_ptr, seen_ptr, penalty, largest, divisor, HAS_PENALTY, BLOCK
            )
            inside = real & (scores >= least)
            if BY_MASS:
                key = _key(p)
                weight = p
            else:
                key = _key(scores)
                weight = tl.where(real, 1.0, 0.0).to(tl.float64)
            upper = inside & (key >= middle)
            found += tl.sum(tl.where(upper, weight, 0.0), 0)
            above = tl.minimum(above, tl.min(tl.where(upper, key, high), 0))
            below = tl.maximum(below, tl.max(tl.where(inside & (key < middle), key, low), 0))
        # to values that occur: nothing lies between the middle and them
        reached = found >= wanted
        low = tl.where(reached, above, low)
        high = tl.where(reached, high, below + 1)
    return low


@triton.jit
def _draw_listed(
    listed_ptr, count, logits_ptr, seen_ptr, penalty, largest, divisor, total, top_p, top_k, uniform, vocab,
    HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First token of those that top-k and top-p keep whose cumulative mass exceeds the uniform number times theirs."""
    nothing = tl.full([], 0.0, tl.float64)
    least = tl.full([], float("-inf"), tl.float64)
    if top_k < vocab:
        low = _edge(
            top_k.to(tl.float64), least, _key(least), _key(largest) + 1, listed_ptr, count, logits_ptr, seen_ptr,
            penalty, largest, divisor, False, HAS_PENALTY, BLOCK,
        )  # fmt: skip
        least = (low ^ ((low >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
        total = nothing
        for first in range(0, count, BLOCK):
            _ids, real, scores, p = _load_listed(
                first, count, listed_ptr, logits_ptr, seen_ptr, penalty, largest, divisor, HAS_PENALTY, BLOCK
            )
            total += tl.sum(tl.where(scores >= least, p, 0.0), 0)
    edge = nothing
    limit = tl.full([], float("inf"), tl.float64)
    if top_p < 1.0:
        limit = top_p * total
        edge = _edge(
            limit, least, _key(nothing), _key(nothing + 1.0) + 1, listed_ptr, count, logits_ptr, seen_ptr,
            penalty, largest, divisor, True, HAS_PENALTY, BLOCK,
        ).to(tl.float64, bitcast=True)  # fmt: skip
    above = nothing  # mass of the probabilities over the edge
    for first in range(0, count, BLOCK):
        _ids, real, scores, p = _load_listed(
            first, count, listed_ptr, logits_ptr, seen_ptr, penalty, largest, divisor, HAS_PENALTY, BLOCK
        )
        above += tl.sum(tl.where((scores >= least) & (p > edge), p, 0.0), 0)
    # of those at the edge, one stays as long as the mass before it is below the limit
    whole = above
    num_equal = tl.full([], 0, tl.int32)
    for first in range(0, count, BLOCK):
        _ids, real, scores, p = _load_listed(
            first, count, listed_ptr, logits_ptr, seen_ptr, penalty, largest, divisor, HAS_PENALTY, BLOCK
        )
        equal = (real & (scores >= least) & (p == edge)).to(tl.int32)
        rank = num_equal + tl.cumsum(equal, 0) - equal
        whole += tl.sum(tl.where((equal > 0) & (above + rank.to(tl.float64) * edge < limit), p, 0.0), 0)
        num_equal += tl.sum(equal, 0)
    wanted = uniform * whole
    running = nothing
    num_equal = tl.full([], 0, tl.int32)
    token = vocab
    last = tl.full([], 0, tl.int32)
    for first in range(0, count, BLOCK):
        ids, real, scores, p = _load_listed(
            first, count, listed_ptr, logits_ptr, seen_ptr, penalty, largest, divisor, HAS_PENALTY, BLOCK
        )
        equal = (real & (scores >= least) & (p == edge)).to(tl.int32)
        rank = num_equal + tl.cumsum(equal, 0) - equal
        stays = (equal > 0) & (above + rank.to(tl.float64) * edge < limit)
        kept = tl.where((real & (scores >= least) & (p > edge)) | stays, p, 0.0)
        some = kept > 0.0
        token = tl.minimum(token, tl.min(tl.where((running + tl.cumsum(kept, 0) > wanted) & some, ids, vocab), 0))
        last = tl.maximum(last, tl.max(tl.where(some, ids, 0), 0))
        running += tl.sum(kept, 0)
        num_equal += tl.sum(equal, 0)
    return tl.minimum(token, last)
