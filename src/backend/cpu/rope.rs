//! Rotary position embedding, and the append of keys and values to their pages.

use super::attention::Heads;
use super::lanes::{LANES, Lanes};
use super::machine::{Machine, Task};
use super::pool::Worker;
use crate::op::PAGE;

/// The operands of rotation and append.
#[derive(Clone, Copy, Debug)]
pub struct Rope<'a> {
    /// `[q | k | v]` rows `[T, (H + 2K)*E]`.
    pub qkv: &'a [f32],
    /// The position of each row.
    pub positions: &'a [i32],
    /// Where each row's key and value go: page * PAGE + offset; no two rows go to one place.
    pub slots: &'a [i32],
    /// Cosines and sines of each position `[context, E]`: E/2 of each.
    pub table: &'a [f32],
}

/// Rotates q and k by position, half-split: dimension d is paired with d + E/2. Writes k and v to the
/// pages `[pages, K, E, PAGE]` and `[pages, K, PAGE, E]`, and q to `out` `[T, H*E]`.
///
/// # Panics
/// If shapes, positions or slots do not fit together.
pub fn rope_append(
    machine: &Machine,
    heads: Heads,
    operands: Rope<'_>,
    (k, v): (&mut [f32], &mut [f32]),
    out: &mut [f32],
) {
    let Heads { heads: h, kv_heads, head_dim } = heads;
    let Rope { qkv, positions, slots, table } = operands;
    let rows = positions.len();
    let page = kv_heads * head_dim * PAGE;
    assert!(
        qkv.len() == rows * (h + 2 * kv_heads) * head_dim && out.len() == rows * h * head_dim,
        "rope: rows"
    );
    assert!(slots.len() == rows && k.len() == v.len() && k.len().is_multiple_of(page), "rope: pages");
    let (context, capacity) = (table.len() / head_dim, k.len() / page * PAGE);
    assert!(positions.iter().all(|&p| p >= 0 && (p as usize) < context), "rope: a position of {context}");
    assert!(slots.iter().all(|&s| s >= 0 && (s as usize) < capacity), "rope: a slot of {capacity}");
    let (k, v, out) = (k.as_mut_ptr(), v.as_mut_ptr(), out.as_mut_ptr());
    machine.run(&Append { heads, operands, k, v, out });
}

struct Append<'a> {
    heads: Heads,
    operands: Rope<'a>,
    k: *mut f32,
    v: *mut f32,
    out: *mut f32,
}

// SAFETY: workers write different rows of `out` and different slots.
unsafe impl Sync for Append<'_> {}

impl Task for Append<'_> {
    #[inline(always)]
    fn run<L: Lanes>(&self, lanes: L, worker: Worker<'_>) {
        for row in worker.share(self.operands.positions.len()) {
            self.append(lanes, row);
        }
    }
}

impl Append<'_> {
    #[inline(always)]
    fn append<L: Lanes>(&self, lanes: L, row: usize) {
        let Heads { heads, kv_heads, head_dim: e } = self.heads;
        let Rope { qkv, positions, slots, table } = self.operands;
        let width = (heads + 2 * kv_heads) * e;
        let qkv = &qkv[row * width..][..width];
        let angles = &table[positions[row] as usize * e..][..e];
        let slot = slots[row] as usize;
        for head in 0..heads {
            // SAFETY: row `row` of the output has a place for each head.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.add((row * heads + head) * e), e) };
            rotate(lanes, &qkv[head * e..][..e], angles, out);
        }
        let mut key = [0f32; 128];
        for head in 0..kv_heads {
            let key = &mut key[..e];
            rotate(lanes, &qkv[(heads + head) * e..][..e], angles, key);
            let block = (slot / PAGE * kv_heads + head) * e * PAGE;
            // SAFETY: `rope_append` has checked that the slot is in the pages, and it is this row's alone.
            unsafe {
                for (d, &x) in key.iter().enumerate() {
                    *self.k.add(block + d * PAGE + slot % PAGE) = x;
                }
                let value = qkv[(heads + kv_heads + head) * e..].as_ptr();
                std::ptr::copy_nonoverlapping(value, self.v.add(block + slot % PAGE * e), e);
            }
        }
    }
}

/// `out = x * cos + rotate_half(x) * sin`, as transformers writes it: `rotate_half` swaps the halves and
/// negates the first.
#[inline(always)]
fn rotate<L: Lanes>(lanes: L, x: &[f32], angles: &[f32], out: &mut [f32]) {
    let half = x.len() / 2;
    for at in (0..half).step_by(LANES) {
        let n = LANES.min(half - at);
        // SAFETY: all four have two halves, with `n` elements left in each.
        unsafe {
            let cos = lanes.load_first(angles.as_ptr().add(at), n);
            let sin = lanes.load_first(angles.as_ptr().add(half + at), n);
            let low = lanes.load_first(x.as_ptr().add(at), n);
            let high = lanes.load_first(x.as_ptr().add(half + at), n);
            let first = lanes.sub(lanes.mul(low, cos), lanes.mul(high, sin));
            let second = lanes.add(lanes.mul(high, cos), lanes.mul(low, sin));
            lanes.store_first(out.as_mut_ptr().add(at), first, n);
            lanes.store_first(out.as_mut_ptr().add(half + at), second, n);
        }
    }
}
