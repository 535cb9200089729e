//! Rotation of q and k, and the append of k and v to their pages: `kernels/rope.cu`.

use super::device::{Device, Launch};
use crate::backend::Call;
use crate::error::Result;
use crate::op::Op;
use crate::tensor::DType;
use bytemuck::NoUninit;

const THREADS: usize = 128;
/// Elements that a thread takes at once where halves of heads are aligned for it.
const VECTOR: usize = 8;

/// As `RopeArgs` in the kernel file.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Args {
    qkv: usize,
    positions: usize,
    slots: usize,
    table: usize,
    k: usize,
    v: usize,
    q: usize,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    unused: u32,
}
const _: () = assert!(size_of::<Args>() == 72);

/// [`Op::RopeAppend`].
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`Backend::run`](crate::backend::Backend::run), with pages `[page][kv head][PAGE][E]`.
pub unsafe fn rope_append(device: &Device, call: &Call<'_>) -> Result<()> {
    let Op::RopeAppend { heads, kv_heads, head_dim } = *call.op else { unreachable!("a RopeAppend") };
    let [qkv, positions, slots, table, k, v] = call.ins else { unreachable!("six operands") };
    if qkv.rows == 0 {
        return Ok(());
    }
    debug_assert!([qkv, k, v].iter().all(|view| view.dtype == device.dtype()) && table.dtype == DType::F32);
    let half = head_dim / 2;
    let pieces = half / if half.is_multiple_of(VECTOR) { VECTOR } else { 1 };
    let args = Args {
        qkv: qkv.addr,
        positions: positions.addr,
        slots: slots.addr,
        table: table.addr,
        k: k.addr,
        v: v.addr,
        q: call.outs[0].addr,
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        head_dim: head_dim as u32,
        unused: 0,
    };
    let items = (heads + 2 * kv_heads) * pieces;
    let grid = [qkv.rows as u32, items.div_ceil(THREADS) as u32, 1];
    let launch = Launch { kernel: "rope_append", grid, block: THREADS as u32, shared: 0 };
    // SAFETY: the caller's obligation.
    unsafe { device.launch(launch, &args) }
}
