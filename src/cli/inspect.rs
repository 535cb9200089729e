//! stub
use crate::error::Result;
#[derive(Debug, clap::Args)]
pub struct Inspect {}
impl Inspect { pub fn run(self) -> Result<()> { Ok(()) } }
