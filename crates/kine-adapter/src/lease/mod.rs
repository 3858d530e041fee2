//! Leases: how long each still runs, and what happens when it ends.
//!
//! What leases there are, their TTLs and their keys are replicated state ([`crate::kv::State`]). How long each still
//! runs is known to the leader alone: [`Lessor`] keeps the deadlines there, answers keep-alives and questions for the
//! time to live (other nodes send theirs over, see `call`), and proposes the end of those that are due.

mod call;
mod deadlines;
mod lessor;

pub use lessor::{Lessor, LessorOptions};
