//! PatchEmbed: `kernels/patch.cu`, on the core in `kernels/gemm.cuh`.

use super::device::Device;
use super::linear::{GemmArgs, shape};
use super::tile::PATCH;
use crate::backend::Call;
use crate::error::Result;
use crate::op::Op;
use crate::tensor::DType;
use bytemuck::NoUninit;

/// As `PatchArgs` in patch.cu.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Args {
    gemm: GemmArgs,
    pixels: usize,
    class_row: usize,
    positions: usize,
    y: usize,
    image: u32,
    patch: u32,
    across: u32,
    unused: u32,
}
const _: () = assert!(size_of::<Args>() == 96);

/// `[class | patches · convᵀ] + positions` of every image; see [`Op::PatchEmbed`].
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`Backend::run`](crate::backend::Backend::run), with weights as this backend prepares them: the
/// convolution's rows padded to a multiple of 8 with zeros; class row and positions in f32.
pub unsafe fn patch_embed(device: &Device, call: &Call<'_>) -> Result<()> {
    let Op::PatchEmbed { image, patch } = *call.op else { unreachable!("a PatchEmbed") };
    let (pixels, y, conv) = (&call.ins[0], &call.outs[0], call.weights[0]);
    let across = image / patch;
    let per_image = across * across + 1;
    debug_assert_eq!((pixels.dtype, y.dtype), (DType::F32, device.dtype()));
    debug_assert_eq!(y.rows, pixels.rows * per_image);
    let shape = shape(y.rows, y.cols, conv.ty.cols);
    // K is short, and one slice needs no workspace.
    let (gemm, launch) = GemmArgs::plan(device, &PATCH, shape, (conv, conv.row_stride), (1, 0))?;
    let args = Args {
        gemm,
        pixels: pixels.addr,
        class_row: call.weights[1].addr,
        positions: call.weights[2].addr,
        y: y.addr,
        image: image as u32,
        patch: patch as u32,
        across: across as u32,
        unused: 0,
    };
    // SAFETY: the caller's obligation; the operands are as the kernel's contract says.
    unsafe { device.launch(launch, &args) }
}
