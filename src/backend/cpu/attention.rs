//! Attention: one core over keys and values in pages, and two callers. A vision tower packs an image's
//! keys and values into pages of its own first; a language model has them in the KV cache already.
//!
//! **Reduction order.** For one query row and head: a score is a chain of fused multiply-adds over the
//! E dimensions, times E^-1/2. Keys are taken in chunks of [`CHUNK`] at absolute positions. A chunk
//! raises the running maximum, rescales sum and result by one factor, adds its weights (sixteen partial
//! sums, then a tree) and its weighted values (a chain of fused multiply-adds, position ascending).
//! Nothing depends on the rows beside it: a chunk that a row does not see at all multiplies by
//! exp(0) = 1 and adds zeros, which changes no bit.

mod core;

use self::core::{Blocks, Queries};
use super::lanes::{LANES, Lanes};
use super::machine::{Machine, Task};
use super::panel::{Matrix, Panel, RowGroup};
use super::pool::Worker;
use crate::op::PAGE;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Positions between two updates of the running maximum. Part of the reduction order.
pub const CHUNK: usize = 64;
/// The largest head.
const MAX_HEAD: usize = 128;
/// Query rows that are computed together: two or four register tiles. Keys, queries and scores of a chunk of
/// heads of 64 are 28 KiB of them, which the nearest cache holds.
const ROWS: usize = 24;

// A vector of scores is a page.
const _: () = assert!(PAGE == LANES && CHUNK.is_multiple_of(PAGE));

/// Bytes of workspace that [`dense`] needs for images of `rows` rows.
pub fn dense_workspace(rows: usize, heads: usize, head_dim: usize) -> usize {
    // A vector that begins in the last row of the last page may end behind it.
    (2 * heads * rows.div_ceil(PAGE) * PAGE * head_dim + LANES) * size_of::<f32>()
}

/// The dimensions of an attention op.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads, H.
    pub heads: usize,
    /// Key and value heads, K, a divisor of H.
    pub kv_heads: usize,
    /// Columns of a head, E: a multiple of 8 up to 128.
    pub head_dim: usize,
}

impl Heads {
    fn check(&self) {
        let Heads { heads, kv_heads, head_dim } = *self;
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "attention: {heads} heads over {kv_heads}");
        assert!(head_dim.is_multiple_of(8) && (8..=MAX_HEAD).contains(&head_dim), "attention: {head_dim}");
    }
}

/// The operands of paged attention.
#[derive(Clone, Copy, Debug)]
pub struct Paged<'a> {
    /// Rotated queries `[T, H*E]`.
    pub q: &'a [f32],
    /// The position of each row; it sees all positions up to its own.
    pub positions: &'a [i32],
    /// Where each row's page table begins in `tables`.
    pub starts: &'a [i32],
    /// Page tables end to end.
    pub tables: &'a [i32],
    /// K pages `[pages, K, E, PAGE]`.
    pub k: &'a [f32],
    /// V pages `[pages, K, PAGE, E]`.
    pub v: &'a [f32],
}

/// `out[t] = softmax(q[t] kᵀ / √E) v` over the pages of each row's sequence, `[T, H*E]`.
///
/// # Panics
/// If shapes, positions or page tables do not fit together.
pub fn paged(machine: &Machine, heads: Heads, operands: Paged<'_>, out: &mut [f32]) {
    heads.check();
    let Paged { q, positions, starts, tables, k, v } = operands;
    let page = heads.kv_heads * heads.head_dim * PAGE;
    let pages = k.len() / page;
    assert!(v.len() == k.len() && k.len() == pages * page, "paged attention: KV pages");
    assert!(q.len() == positions.len() * heads.heads * heads.head_dim && out.len() == q.len());
    assert_eq!(starts.len(), positions.len(), "paged attention: page tables");
    for (&position, &start) in positions.iter().zip(starts) {
        let last = start as usize + position as usize / PAGE;
        assert!(position >= 0 && start >= 0 && last < tables.len(), "paged attention: position {position}");
    }
    assert!(tables.iter().all(|&p| p >= 0 && (p as usize) < pages), "paged attention: a page of {pages}");
    machine.run(&PagedTask { heads, operands, page, out: out.as_mut_ptr(), next: AtomicUsize::new(0) });
}

/// Attention within each image of `rows` rows, over fused `[q | k | v]` rows `[images*rows, 3*H*E]`.
/// With `causal`, a row sees only itself and the rows before it.
///
/// # Panics
/// If shapes or the workspace do not fit.
pub fn dense(
    machine: &Machine,
    heads: Heads,
    qkv: &[f32],
    (rows, causal): (usize, bool),
    out: &mut [f32],
    workspace: &mut [u8],
) {
    heads.check();
    let width = heads.heads * heads.head_dim;
    assert!(heads.heads == heads.kv_heads && rows > 0 && qkv.len() == 3 * out.len());
    assert!(out.len().is_multiple_of(rows * width), "attention: images of {rows} rows");
    assert!(workspace.len() >= dense_workspace(rows, heads.heads, heads.head_dim), "attention: workspace");
    let packed: *mut f32 = workspace.as_mut_ptr().cast();
    assert!(packed.is_aligned(), "attention: workspace");
    for (qkv, out) in qkv.chunks_exact(3 * rows * width).zip(out.chunks_exact_mut(rows * width)) {
        let out = out.as_mut_ptr();
        machine.run(&DenseTask { heads, qkv, rows, causal, out, packed, next: AtomicUsize::new(0) });
    }
}

/// Paged attention, cut into (block of rows, key head).
struct PagedTask<'a> {
    heads: Heads,
    operands: Paged<'a>,
    /// Floats in a page of all heads.
    page: usize,
    out: *mut f32,
    next: AtomicUsize,
}

// SAFETY: workers write the outputs of disjoint (row, head) pairs; all else is only read.
unsafe impl Sync for PagedTask<'_> {}

impl Task for PagedTask<'_> {
    #[inline(always)]
    fn run<L: Lanes>(&self, lanes: L, _: Worker<'_>) {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let Paged { q, positions, starts, tables, k, v } = self.operands;
        // The query heads that share a key head are computed together with neighbouring rows.
        let group = heads / kv_heads;
        let block = (ROWS / group).max(1);
        let blocks = positions.len().div_ceil(block);
        loop {
            let unit = self.next.fetch_add(1, Relaxed);
            if unit >= blocks * kv_heads {
                return;
            }
            let (kv_head, first) = (unit / blocks, unit % blocks * block);
            let offset = kv_head * head_dim * PAGE;
            let mut rows = Queries::new();
            let mut of = None;
            for row in first..positions.len().min(first + block) {
                let (start, seen) = (starts[row] as usize, positions[row] as usize + 1);
                let pages = Blocks {
                    k: k[offset..].as_ptr(),
                    v: v[offset..].as_ptr(),
                    stride: self.page,
                    table: Some(&tables[start..]),
                    head_dim,
                };
                for head in kv_head * group..(kv_head + 1) * group {
                    // They are of one sequence.
                    if rows.len == ROWS || of != Some(start) {
                        // SAFETY: `paged` has checked every row's pages; the pool ends in a spare vector.
                        unsafe { rows.flush(lanes, &Blocks { table: of.map(|of| &tables[of..]), ..pages }) };
                        of = Some(start);
                    }
                    let at = (row * heads + head) * head_dim;
                    rows.push(q[at..].as_ptr(), self.out.wrapping_add(at), seen);
                }
            }
            let table = of.map(|of| &tables[of..]);
            let (k, v) = (k[offset..].as_ptr(), v[offset..].as_ptr());
            // SAFETY: as above.
            unsafe { rows.flush(lanes, &Blocks { k, v, stride: self.page, table, head_dim }) };
        }
    }
}

/// Attention within one image: pack keys and values, then (block of rows, head).
struct DenseTask<'a> {
    heads: Heads,
    qkv: &'a [f32],
    rows: usize,
    causal: bool,
    out: *mut f32,
    packed: *mut f32,
    next: AtomicUsize,
}

// SAFETY: workers pack disjoint pages, meet at a barrier, then write disjoint (row, head) outputs.
unsafe impl Sync for DenseTask<'_> {}

impl Task for DenseTask<'_> {
    #[inline(always)]
    fn run<L: Lanes>(&self, lanes: L, worker: Worker<'_>) {
        let Heads { heads, head_dim, .. } = self.heads;
        let (width, pages) = (heads * head_dim, self.rows.div_ceil(PAGE));
        let page = head_dim * PAGE;
        for unit in worker.share(heads * pages) {
            self.pack(lanes, unit / pages, unit % pages);
        }
        worker.barrier();
        let parts = self.rows.div_ceil(ROWS);
        loop {
            let unit = self.next.fetch_add(1, Relaxed);
            if unit >= parts * heads {
                return;
            }
            let (head, first) = (unit / parts, unit % parts * ROWS);
            let k = self.packed.wrapping_add(head * pages * page);
            let v = k.wrapping_add(heads * pages * page);
            let blocks = Blocks { k, v, stride: page, table: None, head_dim };
            let mut rows = Queries::new();
            for row in first..self.rows.min(first + ROWS) {
                let seen = if self.causal { row + 1 } else { self.rows };
                let q = self.qkv[row * 3 * width + head * head_dim..].as_ptr();
                rows.push(q, self.out.wrapping_add(row * width + head * head_dim), seen);
            }
            // SAFETY: every page of this head is packed, and the workspace ends in a spare vector.
            unsafe { rows.flush(lanes, &blocks) };
        }
    }
}

impl DenseTask<'_> {
    /// Packs one page of one head's keys, transposed, and values.
    #[inline(always)]
    fn pack<L: Lanes>(&self, lanes: L, head: usize, page: usize) {
        let Heads { heads, head_dim, .. } = self.heads;
        let (width, pages) = (heads * head_dim, self.rows.div_ceil(PAGE));
        let (first, size) = (page * PAGE, head_dim * PAGE);
        let k = self.packed.wrapping_add((head * pages + page) * size);
        let v = k.wrapping_add(heads * pages * size);
        let column = width + head * head_dim;
        let rows = RowGroup::new(&Matrix::f32(self.qkv, self.rows, 3 * width), first);
        // SAFETY: the columns are this head's keys, and `k` has room for a page; `v` likewise, in the
        // second half of the workspace.
        unsafe {
            let panel = Panel { at: k, width: PAGE, lane: PAGE, step: PAGE * LANES };
            rows.unpack(lanes, column, head_dim, head_dim, panel);
            for row in first..self.rows.min(first + PAGE) {
                let from = self.qkv[row * 3 * width + width + column..].as_ptr();
                std::ptr::copy_nonoverlapping(from, v.add((row - first) * head_dim), head_dim);
            }
        }
    }
}
