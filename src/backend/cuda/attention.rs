//! Attention within images, and over the pages of a KV cache: `kernels/attention.cu` for many rows,
//! `kernels/paged_decode.cu` for decode rows.

use super::device::{Device, Launch};
use crate::backend::Call;
use crate::error::Result;
use crate::op::{Op, PAGE};
use crate::tensor::View;
use bytemuck::NoUninit;
use std::ops::Range;

/// Threads of a block of decode.
const THREADS: u32 = 128;
/// Positions of a tile of keys, for blocks of many rows.
const KEYS: usize = 64;
/// Positions that one block of decode has in shared memory: part of the reduction order.
const CHUNK: usize = 64;
/// Query heads of a key head that one block of decode serves.
const HEADS: usize = 16;
/// Blocks of decode that there are at least, if there is work for them: a multiprocessor holds four to six at a
/// time, and a few rounds of them hide that some are shorter. A row's bits do not depend on it.
const BLOCKS_PER_MULTIPROCESSOR: usize = 16;

/// Head sizes that kernels exist for, with their names. Others are padded with zeros to the next.
const SIZES: [(usize, &str, &str); 4] = [
    (64, "attention_64", "paged_decode_64"),
    (80, "attention_80", "paged_decode_80"),
    (96, "attention_96", "paged_decode_96"),
    (128, "attention_128", "paged_decode_128"),
];

/// As `AttentionArgs` in the kernel file.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Args {
    q: usize,
    k: usize,
    v: usize,
    out: usize,
    positions: usize,
    starts: usize,
    tables: usize,
    block_stride: i64,
    q_stride: u32,
    kv_stride: u32,
    head_stride: u32,
    rows: u32,
    group: u32,
    head_dim: u32,
    causal: u32,
    scale: f32,
}
const _: () = assert!(size_of::<Args>() == 96);

/// As `PagedDecodeArgs` in the kernel file.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct DecodeArgs {
    q: usize,
    k: usize,
    v: usize,
    out: usize,
    positions: usize,
    starts: usize,
    tables: usize,
    sums: usize,
    stats: usize,
    counters: usize,
    slots: u32,
    heads: u32,
    group: u32,
    head_dim: u32,
    scale: f32,
    zero: u32,
}
const _: () = assert!(size_of::<DecodeArgs>() == 104);

/// [`Op::Attention`].
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`Backend::run`](crate::backend::Backend::run).
pub unsafe fn dense(device: &Device, call: &Call<'_>) -> Result<()> {
    let Op::Attention { heads, head_dim, rows, causal } = *call.op else { unreachable!("an Attention") };
    let (qkv, out) = (call.ins[0], call.outs[0]);
    check(device, head_dim, &[qkv, out]);
    let (width, element) = (heads * head_dim, device.dtype().size());
    let args = Args {
        q: qkv.addr,
        k: qkv.addr + width * element,
        v: qkv.addr + 2 * width * element,
        out: out.addr,
        positions: 0,
        starts: 0,
        tables: 0,
        block_stride: (PAGE * 3 * width) as i64,
        q_stride: 3 * width as u32,
        kv_stride: 3 * width as u32,
        head_stride: head_dim as u32,
        rows: rows as u32,
        group: 1,
        head_dim: head_dim as u32,
        causal: causal as u32,
        scale: scale(head_dim),
    };
    // SAFETY: the caller's obligation; all rows of an image are there, q, k and v one after the other.
    unsafe { launch(device, &args, heads, qkv.rows / rows) }
}

/// [`Op::PagedAttention`] of prefill rows.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`Backend::run`](crate::backend::Backend::run), with pages `[page][kv head][PAGE][E]`; `rows` are rows of
/// the call.
pub unsafe fn paged_prefill(device: &Device, call: &Call<'_>, rows: Range<usize>) -> Result<()> {
    let Op::PagedAttention { heads, kv_heads, head_dim } = *call.op else { unreachable!("a PagedAttention") };
    let [q, positions, starts, tables, k, v] = *call.ins else { unreachable!("six operands") };
    check(device, head_dim, &[q, k, v, call.outs[0]]);
    let args = Args {
        q: from_row(q, rows.start),
        k: k.addr,
        v: v.addr,
        out: from_row(call.outs[0], rows.start),
        positions: from_row(positions, rows.start),
        starts: from_row(starts, rows.start),
        tables: tables.addr,
        block_stride: (kv_heads * PAGE * head_dim) as i64,
        q_stride: (heads * head_dim) as u32,
        kv_stride: head_dim as u32,
        head_stride: (PAGE * head_dim) as u32,
        rows: rows.len() as u32,
        group: (heads / kv_heads) as u32,
        head_dim: head_dim as u32,
        causal: 1,
        scale: scale(head_dim),
    };
    // SAFETY: the caller's obligation.
    unsafe { launch(device, &args, heads, 1) }
}

/// # Safety
/// The arguments point to live memory, as attention.cu says.
unsafe fn launch(device: &Device, args: &Args, heads: usize, images: usize) -> Result<()> {
    if args.rows == 0 || images == 0 {
        return Ok(());
    }
    let (size, kernel, _) = padded(args.head_dim as usize);
    let warps = warps(size);
    let grid = [heads as u32, args.rows.div_ceil(16 * warps), images as u32];
    let shared = prefill_shared(size) as u32;
    // SAFETY: the caller's obligation.
    unsafe { device.launch(Launch { kernel, grid, block: 32 * warps, shared }, args) }
}

/// [`Op::PagedAttention`] of decode rows.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`paged_prefill`], with a workspace of [`workspace`] bytes.
pub unsafe fn paged_decode(device: &Device, call: &Call<'_>, rows: Range<usize>) -> Result<()> {
    let Op::PagedAttention { heads, kv_heads, head_dim } = *call.op else { unreachable!("a PagedAttention") };
    let [q, positions, starts, tables, k, v] = *call.ins else { unreachable!("six operands") };
    check(device, head_dim, &[q, k, v, call.outs[0]]);
    if rows.is_empty() {
        return Ok(());
    }
    let group = heads / kv_heads;
    let split = Split::new(device, (heads, kv_heads), rows.len(), tables.rows);
    let args = DecodeArgs {
        q: from_row(q, rows.start),
        k: k.addr,
        v: v.addr,
        out: from_row(call.outs[0], rows.start),
        positions: from_row(positions, rows.start),
        starts: from_row(starts, rows.start),
        tables: tables.addr,
        sums: call.workspace,
        stats: call.workspace + split.slots * heads * head_dim * size_of::<f32>(),
        counters: device.counters(),
        slots: split.slots as u32,
        heads: heads as u32,
        group: group as u32,
        head_dim: head_dim as u32,
        scale: scale(head_dim),
        zero: 0,
    };
    let (size, _, kernel) = padded(head_dim);
    let grid = [split.blocks as u32, rows.len() as u32, split.parts as u32];
    let shared = decode_shared(size, group.min(HEADS)) as u32;
    // SAFETY: the caller's obligation.
    unsafe { device.launch(Launch { kernel, grid, block: THREADS, shared }, &args) }
}

/// Bytes of workspace that [`paged_decode`] needs for up to `rows` rows with `entries` entries in their page tables.
pub fn workspace(device: &Device, op: &Op, rows: usize, entries: usize) -> usize {
    let Op::PagedAttention { heads, kv_heads, head_dim } = *op else { return 0 };
    let slots = Split::new(device, (heads, kv_heads), rows, entries).slots;
    slots * heads * (head_dim + 2) * size_of::<f32>()
}

/// How the keys of decode rows are divided among blocks.
struct Split {
    /// Blocks of a row that differ in their heads.
    blocks: usize,
    /// Blocks that share the chunks of a row's keys.
    parts: usize,
    /// Chunks that the workspace has room for. Rows that find none are left to one block each.
    slots: usize,
}

impl Split {
    fn new(device: &Device, (heads, kv_heads): (usize, usize), rows: usize, entries: usize) -> Self {
        let blocks = kv_heads * (heads / kv_heads).div_ceil(HEADS);
        let wanted = BLOCKS_PER_MULTIPROCESSOR * device.limits().multiprocessors as usize;
        let chunks = entries.div_ceil(CHUNK / PAGE);
        let parts = (wanted / (blocks * rows.max(1))).clamp(1, chunks.max(1));
        // Rows of different sequences have at most one chunk each that is not full; and more rows than these are
        // not divided, so they need no room: nor would a call of many rows, most of them not decode rows.
        let divided = rows.min(wanted / (2 * blocks));
        Split { blocks, parts, slots: entries / (CHUNK / PAGE) + divided }
    }
}

/// Bytes of a row of a head of `size` in shared memory: `ROW` in attention.cuh.
const fn shared_row(size: usize) -> usize {
    2 * (size + 8)
}

/// Warps of a block of many rows, each with sixteen of them: `WARPS` in attention.cu.
const fn warps(size: usize) -> u32 {
    if size <= 64 { 5 } else { 4 }
}

/// Two stages, each with a tile of keys and one of values.
const fn prefill_shared(size: usize) -> usize {
    2 * 2 * KEYS * shared_row(size)
}

/// A chunk of keys and one of values, or what the warps found in them for 16 heads (`Found` in paged_decode.cu); and
/// 1 KiB of sums for each head of the block.
const fn decode_shared(size: usize, heads: usize) -> usize {
    let (stage, found) = (2 * CHUNK * shared_row(size), 4 * HEADS * (size + 8 + 2) * size_of::<f32>());
    (if stage > found { stage } else { found }) + 1024 * heads
}

// What a block may have on every GPU from sm_80 on.
const _: () = assert!(prefill_shared(128) <= 99 << 10 && decode_shared(128, HEADS) <= 99 << 10);

/// The size of head that a kernel exists for, and the names of the kernels.
fn padded(head_dim: usize) -> (usize, &'static str, &'static str) {
    *SIZES.iter().find(|(size, ..)| head_dim <= *size).expect("`Op::infer` lets heads be at most 128")
}

/// Folds the conversion from e^x to 2^x into the scale of the scores.
fn scale(head_dim: usize) -> f32 {
    (std::f64::consts::LOG2_E / (head_dim as f64).sqrt()) as f32
}

fn from_row(view: View, row: usize) -> usize {
    view.addr + row * view.cols * view.dtype.size()
}

/// Heads of a multiple of 8 elements begin at multiples of 16 bytes, which is what the kernels copy.
fn check(device: &Device, head_dim: usize, views: &[View]) {
    debug_assert!(head_dim.is_multiple_of(8) && head_dim <= 128);
    debug_assert!(views.iter().all(|view| view.dtype == device.dtype() && view.addr.is_multiple_of(16)));
}
