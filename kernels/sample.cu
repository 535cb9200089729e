// Sample: the next token of every row of logits, in Hugging Face's order: repetition penalty, temperature, top-k, top-p,
// min-p, draw; or the largest logit if the temperature is 0 (the lowest id among equals). -1 if a logit is not finite.
//
// logits f32 [rows, vocab], params one SampleParams a row, seen a bit for each id [rows, ceil(vocab / 32)], token i32
// [rows]. One block of 1024 a row; shared: sizeof(SampleShared). vocab at most 2^19: the sums fit 64 bits.
//
// Nothing is sorted and no candidate is stored: a step finds a threshold, and the next goes over the logits again,
// which are in L2. 32000 of them are 128 KB, for which one SM takes 2000 clocks at 64 bytes a clock. Greedy is one
// such pass: 1 to 2 us beside the 61 us that the floor of a 7B model's last product is, 10 us beside 490 us at 256k ids;
// more blocks a row would save 2 % of that product at most, and need a combination. Top-k adds three passes,
// top-p three, the draw one. Floor: the logits, read once.
//
// Scores are those of backend/cpu/sample.rs bit for bit, probabilities but for the error of expf. Sums are of
// integers, multiples of 2^-44 of the largest probability to which each is rounded down: any order of summing gives
// the same. The token is the CPU's unless a limit lies within 2^-20 of a sum; see tests/cuda_sampling.rs.
#include "common.cuh"

// op.rs: SampleParams.
struct SampleParams {
    float temperature;
    uint32_t top_k;
    float top_p, min_p, repetition_penalty;
    uint32_t seed_low, seed_high, position;
};
static_assert(sizeof(SampleParams) == 32);

struct SampleArgs {
    const float* logits;
    const SampleParams* params;
    const uint32_t* seen;
    int* token;
    uint32_t vocab;
    uint32_t seen_words;  // of a row
};
static_assert(sizeof(SampleArgs) == 40);

constexpr int THREADS = 1024, WARPS = THREADS / WARP;
constexpr int BINS = 2048;  // two a thread

// Where a descending list of keys, each with a weight, passes a limit.
struct Cut {
    uint32_t key;    // of the last that begins below the limit
    uint32_t ties;   // how many have this key
    uint64_t above;  // the weight of all larger keys
};

struct SampleShared {
    uint64_t of_warp[WARPS], prefix[WARPS];
    Cut cut;
    uint32_t id;
    uint32_t unused;
    // Of the keys in each bin: how many, and the sums of their low 10 bits and of the bits above.
    uint32_t count[BINS], low[BINS], high[BINS];
};
static_assert(sizeof(SampleShared) == 25112);

// ---- integers ------------------------------------------------------------------------------------

// Ascending with x; the zeros are equal.
DEVICE uint32_t order_of(float x) {
    uint32_t bits = float_to_bits(x + 0.0f);
    return bits ^ ((uint32_t)((int)bits >> 31) | 0x80000000u);
}

// `mantissas`, a sum of mantissas of floats with the exponent of `like` (at most 1), in units of 2^-44.
DEVICE uint64_t fixed_point(uint64_t mantissas, uint32_t like) {
    int shift = (int)(like >> 23) - (127 + 23 - 44);
    return shift >= 0 ? mantissas << shift : shift > -64 ? mantissas >> -shift : 0;
}
DEVICE uint32_t mantissa(uint32_t bits) { return (bits & 0x7fffff) | 0x800000; }
DEVICE uint64_t fixed_point(float x) { return fixed_point(mantissa(float_to_bits(x)), float_to_bits(x)); }

template <class F> DEVICE uint64_t reduce_warp(uint64_t x, F f) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x = f(x, shuffle_xor(x, step));
    return x;
}

// The result in every thread; f associative and commutative.
template <class F> DEVICE uint64_t reduce_block(uint64_t x, uint64_t* of_warp, F f) {
    x = reduce_warp(x, f);
    if (lane_id() == 0) of_warp[warp_id()] = x;
    sync_block();
    x = reduce_warp(of_warp[lane_id()], f);
    sync_block();
    return x;
}

// The sum over this and all lower lanes.
DEVICE uint64_t prefix_sum(uint64_t x) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        uint64_t lower = shuffle(x, max(lane_id() - step, 0));
        if (lane_id() >= step) x += lower;
    }
    return x;
}

DEVICE int count_ones(uint32_t x) {
    int n = 0;
    for (; x; x &= x - 1) n++;
    return n;
}

// The first word of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
DEVICE uint32_t philox(uint32_t position, uint32_t key0, uint32_t key1) {
    uint32_t c0 = position, c1 = 0, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ key0, c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ key1, c3 = (uint32_t)a;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return c0;
}

// ---- one row -------------------------------------------------------------------------------------

struct Sampler {
    SampleShared& shared;
    const float* logits;
    const uint32_t* seen;
    SampleParams params;
    uint32_t vocab;
    // Who is still in the running: scores from `least` on (an order_of), probabilities (bits) above `cut`, and
    // those equal to it up to id `last_tie`.
    float max_score = 0.0f;
    uint32_t least = 0, cut = 0, last_tie = 0xffffffffu;

    DEVICE Sampler(const SampleArgs& args, SampleShared& shared) : shared(shared), vocab(args.vocab) {
        int64_t row = blockIdx.x;
        logits = args.logits + row * args.vocab;
        seen = args.seen + row * args.seen_words;
        params = args.params[row];
    }

    DEVICE float score(uint32_t id, float x) const {
        float penalty = params.repetition_penalty;
        if (penalty != 1.0f && (seen[id / 32] >> (id % 32) & 1)) x = x < 0.0f ? x * penalty : x / penalty;
        return params.temperature == 0.0f ? x : x / params.temperature;
    }
    // Relative to the largest, which is 1 even if it is infinite. What parameters out of range make NaN is 1, too.
    DEVICE float probability(float score) const {
        return score == max_score ? 1.0f : fminf(expf(score - max_score), 1.0f);
    }

    // f(id, logit) for every id, dealt out to the threads.
    template <class F> DEVICE void each(F f) const {
        if (vocab % 4 == 0) {
            each_piece<4>(f);
        } else {
            each_piece<1>(f);
        }
    }
    template <int W, class F> DEVICE void each_piece(F f) const {
        for (uint32_t at = threadIdx.x * W; at < vocab; at += THREADS * W) {
            float x[W];
            load<W>(logits + at, x);
#pragma unroll
            for (int i = 0; i < W; i++) f(at + i, x[i]);
        }
    }

    // The largest score and, in the lower half complemented, the lowest id that has it; all ones if a logit is not
    // finite.
    DEVICE uint64_t best() const {
        uint64_t best = 0;
        each([&](uint32_t id, float x) {
            bool finite = (float_to_bits(x) & 0x7f800000u) != 0x7f800000u;
            // What a GPU makes of parameters out of range is a NaN of all ones, which would read as a logit that is not
            // finite.
            uint32_t order = order_of(score(id, x));
            if (order == 0xffffffffu) order--;
            uint64_t candidate = finite ? (uint64_t)order << 32 | ~id : ~0ull;
            if (candidate > best) best = candidate;
        });
        return reduce_block(best, shared.of_warp, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
    }

    // Radix select over 32-bit keys in digits of 11, 11 and 10 bits: the last key, in descending order, with less than
    // target(weight of all) above it. key(id, logit, k) says whether there is one. A key weighs 1 or, if `by_value`,
    // the float at most 1 whose bits it is; those in one bin share its exponent, so that their mantissas can be summed.
    template <bool by_value, class Key, class Target> DEVICE Cut select(Key key, Target target) {
        Cut cut{};
        uint64_t limit = 0;
#pragma unroll 1
        for (int level = 0; level < 3; level++) {
            int shift = level == 0 ? 21 : level == 1 ? 10 : 0, bits = level == 2 ? 10 : 11;
            for (int i = threadIdx.x; i < BINS; i += THREADS) shared.count[i] = shared.low[i] = shared.high[i] = 0;
            sync_block();
            each([&](uint32_t id, float x) {
                uint32_t k;
                if (!key(id, x, k) || (uint64_t)(k ^ cut.key) >> (shift + bits)) return;
                uint32_t bin = k >> shift & ((1u << bits) - 1), rest = k & ((1u << shift) - 1);
                add_shared(&shared.count[bin], 1);
                if (by_value && rest) {
                    add_shared(&shared.low[bin], rest & 1023);
                    add_shared(&shared.high[bin], rest >> 10);
                }
            });
            sync_block();

            // Two bins a thread, the largest keys first.
            uint32_t bin = BINS - 1 - 2 * threadIdx.x;
            auto weight = [&](uint32_t bin) -> uint64_t {
                if (!by_value) return shared.count[bin];
                uint32_t like = cut.key | bin << shift;
                uint64_t rests = ((uint64_t)shared.high[bin] << 10) + shared.low[bin];
                return fixed_point((uint64_t)shared.count[bin] * mantissa(like) + rests, like);
            };
            uint64_t first = weight(bin), both = first + weight(bin - 1), upto = prefix_sum(both);
            if (lane_id() == WARP - 1) shared.prefix[warp_id()] = upto;
            sync_block();
            uint64_t upto_warp = prefix_sum(shared.prefix[lane_id()]);
            uint64_t all = shuffle(upto_warp, WARP - 1);
            if (warp_id() > 0) upto += shuffle(upto_warp, warp_id() - 1);
            if (level == 0) limit = target(all);

            uint64_t above = cut.above + upto - both;
            uint32_t place = 0;  // of the last of the two with keys that begin below the limit, from 1
            if (shared.count[bin] && above < limit) place = 2 * threadIdx.x + 1;
            if (shared.count[bin - 1] && above + first < limit) place = 2 * threadIdx.x + 2;
            uint64_t last = reduce_block(place, shared.of_warp, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
            if (place && place == last) {
                bool second = place % 2 == 0;
                bin -= second;
                shared.cut = {cut.key | bin << shift, shared.count[bin], above + (second ? first : 0)};
            }
            sync_block();
            cut = shared.cut;
        }
        return cut;
    }

    // The first id up to which masses add up to more than target(mass of all), if there is any mass.
    template <class Mass, class Target> DEVICE uint32_t locate(Mass mass, Target target) {
        // A stretch of ids for each warp; the one in which it happens goes through its stretch again.
        uint32_t stretch = (vocab + THREADS - 1) / THREADS * WARP, begin = warp_id() * stretch;
        uint32_t end = min(begin + stretch, vocab);
        uint64_t sum = 0;
        for (uint32_t id = begin + lane_id(); id < end; id += WARP) sum += mass(id, logits[id]);
        sum = reduce_warp(sum, [](uint64_t a, uint64_t b) { return a + b; });
        if (lane_id() == 0) shared.of_warp[warp_id()] = sum;
        sync_block();
        uint64_t upto = prefix_sum(shared.of_warp[lane_id()]);
        uint64_t wanted = target(shuffle(upto, WARP - 1));
        int warp = WARPS - count_ones(lanes_where(upto > wanted));
        if (warp_id() == warp) {
            uint64_t running = warp == 0 ? 0 : shuffle(upto, warp - 1);
            for (uint32_t base = begin; base < end; base += WARP) {
                // Behind the end the last id stands again: it happens no later than there.
                uint32_t id = min(base + lane_id(), end - 1);
                uint64_t mine = running + prefix_sum(mass(id, logits[id]));
                uint32_t past = lanes_where(mine > wanted);
                if (past) {
                    if (lane_id() == WARP - count_ones(past)) shared.id = id;
                    break;
                }
                running = shuffle(mine, WARP - 1);
            }
        }
        sync_block();
        return shared.id;
    }

    DEVICE bool survives(uint32_t id, float score, float p) const {
        uint32_t bits = float_to_bits(p);
        return order_of(score) >= least && (bits > cut || (bits == cut && id <= last_tie)) && !(p < params.min_p);
    }

    DEVICE void top_k() {
        auto key = [&](uint32_t id, float x, uint32_t& k) {
            k = order_of(score(id, x));
            return true;
        };
        least = select<false>(key, [&](uint64_t) { return (uint64_t)params.top_k; }).key;
    }

    // A token stays if the more probable ones, ties by id, leave room below top_p of the sum; the first always stays.
    DEVICE void top_p() {
        uint64_t limit = 0;
        auto key = [&](uint32_t id, float x, uint32_t& k) {
            float s = score(id, x);
            k = float_to_bits(probability(s));
            return order_of(s) >= least;
        };
        Cut found = select<true>(key, [&](uint64_t all) {
            return limit = (uint64_t)fmax(ceil((double)params.top_p * (double)all), 1.0);
        });
        uint64_t one = max(fixed_point(bits_to_float(found.key)), (uint64_t)1);
        uint64_t kept = (limit - found.above + one - 1) / one;
        if (kept < found.ties) {
            auto tie = [&](uint32_t id, float x) {
                uint32_t k;
                return (uint64_t)(key(id, x, k) && k == found.key);
            };
            last_tie = locate(tie, [&](uint64_t) { return kept - 1; });
        }
        cut = found.key;
    }

    DEVICE int choose() {
        uint64_t top = best();
        if (top == ~0ull) return -1;
        uint32_t first = ~(uint32_t)top;
        if (params.temperature == 0.0f) return first;
        max_score = score(first, logits[first]);
        // The answer if nothing survives, as with a min-p above 1, which the host does not let through.
        if (threadIdx.x == 0) shared.id = first;
        if (params.top_k > 0 && params.top_k < vocab) top_k();
        if (params.top_p < 1.0f) top_p();
        auto mass = [&](uint32_t id, float x) {
            float s = score(id, x), p = probability(s);
            return survives(id, s, p) ? fixed_point(p) : 0;
        };
        // u of the whole, u a multiple of 2^-24 in [0, 1), rounded down: exact.
        uint64_t u = philox(params.position, params.seed_low, params.seed_high) >> 8;
        return locate(mass, [&](uint64_t all) { return (all >> 24) * u + ((all & 0xffffff) * u >> 24); });
    }
};

DEVICE void sample(const SampleArgs& args) {
    SHARED(shared);
    int token = Sampler(args, *(SampleShared*)shared).choose();
    if (threadIdx.x == 0) args.token[blockIdx.x] = token;
}

KERNEL(1024, 1, sample_bf16, SampleArgs) { sample(args); }
KERNEL(1024, 1, sample_f16, SampleArgs) { sample(args); }
