//! Rows gathered: `kernels/embed.cu`.

use super::device::{Device, Launch};
use crate::backend::Call;
use crate::error::Result;
use crate::op::{Op, Select};
use crate::tensor::DType;
use bytemuck::NoUninit;

const THREADS: u32 = 256;

/// As `EmbedArgs` in the kernel file.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct EmbedArgs {
    ids: usize,
    sources: usize,
    image_rows: usize,
    table: usize,
    y: usize,
    cols: u32,
    table_stride: u32,
}
const _: () = assert!(size_of::<EmbedArgs>() == 48);

/// As `TokensArgs` in the kernel file.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct TokensArgs {
    ids: usize,
    table: usize,
    positions: usize,
    y: usize,
    cols: u32,
    table_stride: u32,
    period: u32,
    unused: u32,
}
const _: () = assert!(size_of::<TokensArgs>() == 48);

/// As `SelectArgs` in the kernel file.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct SelectArgs {
    x: usize,
    index: usize,
    y: usize,
    cols: u32,
    y_cols: u32,
    offset: u32,
    period: u32,
}
const _: () = assert!(size_of::<SelectArgs>() == 40);

/// [`Op::EmbedRows`].
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`Backend::run`](crate::backend::Backend::run).
pub unsafe fn embed_rows(device: &Device, call: &Call<'_>) -> Result<()> {
    let ([ids, sources, image_rows], table, y) = (call.ins, call.weights[0], &call.outs[0]) else {
        unreachable!("three operands")
    };
    if y.is_empty() {
        return Ok(());
    }
    debug_assert!(table.ty.dtype == device.dtype() && image_rows.dtype == device.dtype());
    let args = EmbedArgs {
        ids: ids.addr,
        sources: sources.addr,
        image_rows: image_rows.addr,
        table: table.addr,
        y: y.addr,
        cols: y.cols as u32,
        table_stride: (table.row_stride / table.ty.dtype.size()) as u32,
    };
    let launch = Launch { kernel: "embed_rows", grid: [y.rows as u32, 1, 1], block: THREADS, shared: 0 };
    // SAFETY: the caller's obligation.
    unsafe { device.launch(launch, &args) }
}

/// [`Op::EmbedTokens`].
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`Backend::run`](crate::backend::Backend::run).
pub unsafe fn embed_tokens(device: &Device, call: &Call<'_>) -> Result<()> {
    let (ids, table, positions, y) = (&call.ins[0], call.weights[0], call.weights[1], &call.outs[0]);
    if y.is_empty() {
        return Ok(());
    }
    debug_assert!(table.ty.dtype == device.dtype() && positions.ty.dtype == DType::F32);
    let args = TokensArgs {
        ids: ids.addr,
        table: table.addr,
        positions: positions.addr,
        y: y.addr,
        cols: y.cols as u32,
        table_stride: (table.row_stride / device.dtype().size()) as u32,
        period: positions.ty.rows as u32,
        unused: 0,
    };
    let launch = Launch { kernel: "embed_tokens", grid: [y.rows as u32, 1, 1], block: THREADS, shared: 0 };
    // SAFETY: the caller's obligation: ids name rows of the table.
    unsafe { device.launch(launch, &args) }
}

/// [`Op::SelectRows`]: a launch for each operand that is put side by side.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
///
/// # Safety
/// As for [`Backend::run`](crate::backend::Backend::run).
pub unsafe fn select_rows(device: &Device, call: &Call<'_>) -> Result<()> {
    let Op::SelectRows { select } = *call.op else { unreachable!("a SelectRows") };
    let y = &call.outs[0];
    let (operands, index, period) = match select {
        Select::Index => (&call.ins[..1], call.ins[1].addr, 0),
        Select::All => (call.ins, 0, 0),
        Select::Patches { rows } => (call.ins, 0, rows as u32),
    };
    let mut offset = 0;
    for x in operands.iter().filter(|_| !y.is_empty()) {
        debug_assert!(x.dtype == device.dtype() && y.dtype == device.dtype());
        let args = SelectArgs {
            x: x.addr,
            index,
            y: y.addr,
            cols: x.cols as u32,
            y_cols: y.cols as u32,
            offset,
            period,
        };
        let launch = Launch { kernel: "select_rows", grid: [y.rows as u32, 1, 1], block: THREADS, shared: 0 };
        // SAFETY: the caller's obligation.
        unsafe { device.launch(launch, &args)? };
        offset += x.cols as u32;
    }
    Ok(())
}
