//! A backend around a backend: its ops and copies are counted, its results may be changed, and it may refuse to record.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tessera::Result;
use tessera::backend::{Backend, Buffer, Call, Prepared, Recording};
use tessera::op::{Op, WeightType};
use tessera::tensor::{DType, View, Weight};

/// What is done after an op ran, which is told by its number since the backend was made.
pub type After = Box<dyn Fn(&dyn Backend, usize, &Call<'_>) + Send + Sync>;

/// A backend whose ops are counted, and whose results may be spoilt.
pub struct Watched {
    pub inner: Arc<dyn Backend>,
    pub ops: AtomicUsize,
    pub replays: Arc<AtomicUsize>,
    pub uploads: AtomicUsize,
    pub downloads: AtomicUsize,
    /// Bytes of the downloads.
    pub fetched: AtomicUsize,
    /// Whether it refuses to record.
    pub cannot_record: AtomicBool,
    pub after: After,
}

impl Watched {
    pub fn new(inner: Arc<dyn Backend>, after: After) -> Arc<Self> {
        Arc::new(Watched {
            inner,
            ops: AtomicUsize::new(0),
            replays: Arc::default(),
            uploads: AtomicUsize::new(0),
            downloads: AtomicUsize::new(0),
            fetched: AtomicUsize::new(0),
            cannot_record: AtomicBool::new(false),
            after,
        })
    }

    /// The processor as a device that keeps activations in `dtype`: what a model loses by 16 bits alone.
    pub fn rounding(dtype: DType) -> Arc<Self> {
        let cpu = tessera::backend::cpu::CpuBackend::new(None).unwrap();
        Watched::new(
            Arc::new(cpu),
            Box::new(move |cpu, _, call| {
                let wide = matches!(call.op, Op::Linear { wide: true, .. });
                let outs = call.outs.iter().filter(|out| out.dtype == DType::F32 && !wide);
                // Keys and values are kept in 16 bits as well.
                let pages = if matches!(call.op, Op::RopeAppend { .. }) { &call.ins[4..6] } else { &[] };
                outs.chain(pages).for_each(|view| change(cpu, view, |x| round(dtype, x)));
            }),
        )
    }
}

fn round(dtype: DType, values: &mut [f32]) {
    let mut bytes = vec![0; values.len() * dtype.size()];
    dtype.round_to(values, &mut bytes);
    dtype.widen_to(&bytes, values);
}

/// Changes what a view holds.
pub fn change(backend: &dyn Backend, view: &View, f: impl Fn(&mut [f32])) {
    let mut bytes = vec![0; view.bytes()];
    // SAFETY: a view of the call that has just run; the executor touches nothing meanwhile.
    unsafe { backend.download(view.addr, &mut bytes).unwrap() };
    let mut values = view.dtype.widen(&bytes);
    f(&mut values);
    view.dtype.round_to(&values, &mut bytes);
    // SAFETY: as above.
    unsafe { backend.upload(view.addr, &bytes).unwrap() };
}

struct Counted(Box<dyn Recording>, Arc<AtomicUsize>);

impl Recording for Counted {
    unsafe fn replay(&self) -> Result<()> {
        self.1.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's obligation.
        unsafe { self.0.replay() }
    }
}

impl Backend for Watched {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn dtype(&self) -> DType {
        self.inner.dtype()
    }

    fn alloc(&self, what: &str, bytes: usize) -> Result<Buffer> {
        self.inner.alloc(what, bytes)
    }

    fn prepare(&self, op: &Op, weights: &[Weight]) -> Result<Vec<Prepared>> {
        self.inner.prepare(op, weights)
    }

    fn workspace(&self, op: &Op, ins: &[View], weights: &[WeightType], outs: &[View]) -> usize {
        self.inner.workspace(op, ins, weights, outs)
    }

    unsafe fn run(&self, call: &Call<'_>) -> Result<()> {
        // SAFETY: the caller's obligation.
        unsafe { self.inner.run(call)? };
        (self.after)(&*self.inner, self.ops.fetch_add(1, Ordering::Relaxed), call);
        Ok(())
    }

    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Recording>>> {
        if self.cannot_record.load(Ordering::Relaxed) {
            let problem = "nothing can be recorded".into();
            return Err(tessera::Error::Device { device: "watched".into(), problem });
        }
        let recording = self.inner.record(work)?;
        Ok(recording.map(|recording| Box::new(Counted(recording, self.replays.clone())) as _))
    }

    unsafe fn upload(&self, addr: usize, bytes: &[u8]) -> Result<()> {
        self.uploads.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's obligation.
        unsafe { self.inner.upload(addr, bytes) }
    }

    unsafe fn download(&self, addr: usize, bytes: &mut [u8]) -> Result<()> {
        self.downloads.fetch_add(1, Ordering::Relaxed);
        self.fetched.fetch_add(bytes.len(), Ordering::Relaxed);
        // SAFETY: the caller's obligation.
        unsafe { self.inner.download(addr, bytes) }
    }

    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<()> {
        // SAFETY: the caller's obligation.
        unsafe { self.inner.copy(from, to, bytes) }
    }

    unsafe fn finite(&self, view: &View) -> Result<bool> {
        // SAFETY: the caller's obligation.
        unsafe { self.inner.finite(view) }
    }
}
