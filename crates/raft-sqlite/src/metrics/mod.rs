//! Figures for monitoring: counted in atomics where things happen, put together when somebody asks ([`crate::Node::metrics`]).
//!
//! Nothing is registered anywhere and no facade is forced on the program: what [`crate::Node::metrics`] gives can be printed in the text
//! format of Prometheus (`Display`), or walked and handed to whatever the program uses (docs/adr/0009). A write costs a few atomic
//! additions and clock readings more than without.
//!
//! - [`recorder`]: what is counted on the way;
//! - [`family`]: what is shown.
//!
//! docs/operations.md lists every name, what it means, and what to be alarmed by.

pub mod family;
pub(crate) mod recorder;

pub use family::{HistogramValue, MetricFamily, MetricKind, MetricSample, MetricValue, Metrics};
