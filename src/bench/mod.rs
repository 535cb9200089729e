//! The instrument: how long each stage takes, and how far it is from what the hardware can do.
//!
//! [`plan`] says what to run, [`measure`] runs it on an [`Engine`](crate::runtime::Engine) and [`clip`] on a CLIP
//! by itself, [`ops`] runs one op at a time; every result is a [`report::Row`] that carries what is needed to
//! believe it ([`environment`]). [`compare`] judges two reports. [`profile`] runs one answer node by node, [`trace`]
//! shows where its time went and [`roofline`] draws it.
//!
//! Definitions. *Ceilings* are measured beside every test, on the same threads ([`Ceilings`]). The *floor* of
//! a test is the larger of its FLOPs over the one and its bytes over the other ceiling, step by step; a
//! percentage is floor over time. TTFT is the time from the request to its first token, TPOT the mean time
//! of a token after the first, ITL the time between two tokens, as vLLM defines them.
//!
//! [`Ceilings`]: crate::backend::Ceilings

pub mod clip;
pub mod compare;
mod drawn;
pub mod environment;
pub mod format;
pub mod measure;
pub mod ops;
pub mod plan;
pub mod profile;
pub mod report;
pub mod roofline;
pub mod startup;
pub mod stats;
pub mod subject;
pub mod trace;
