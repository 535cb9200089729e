//! stub
pub mod sample;
use crate::backend::*;
use crate::op::Op;
/// stub
pub struct CpuBackend;
impl CpuBackend { 
    /// stub
    pub fn new(_t: Option<usize>) -> Result<Self> { Ok(CpuBackend) }
    /// stub
    pub fn threads(&self) -> usize { 1 }
    /// stub
    pub fn instruction_sets(&self) -> impl Iterator<Item=&'static str> { ["x"].into_iter() }
}
/// stub
pub fn physical_memory() -> u64 { 0 }
impl Backend for CpuBackend {
    fn describe(&self) -> String { todo!() }
    fn alloc(&self, _: &str, _: usize) -> Result<Buffer> { todo!() }
    fn prepare(&self, _: &Weight) -> Result<Prepared> { todo!() }
    fn workspace(&self, _: &Op, _: &[View], _: &[WeightType], _: &[View]) -> usize { todo!() }
    unsafe fn run(&self, _: &Call<'_>) { todo!() }
    unsafe fn upload(&self, _: usize, _: &[u8]) { todo!() }
    unsafe fn download(&self, _: usize, _: &mut [u8]) { todo!() }
    unsafe fn copy(&self, _: usize, _: usize, _: usize) { todo!() }
}
