//! How long a call may take.

use std::time::{Duration, Instant};

use super::Database;

/// How long past its deadline the answer of another node is waited for: that node keeps the deadline, and knows the outcome.
pub(super) const ANSWER_GRACE: Duration = Duration::from_secs(1);

/// A bound on the wire: 0 stands for none.
pub(super) fn to_millis(timeout: Option<Duration>) -> u64 {
    timeout.map_or(0, |timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1))
}

/// What is left of it, on the wire.
pub(super) fn left_millis(deadline: Option<Instant>) -> u64 {
    to_millis(deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())))
}

/// A bound from the wire, from now on.
pub(crate) fn from_millis(millis: u64) -> Option<Instant> {
    // Too far away to be an instant: as good as none.
    (millis > 0).then(|| Instant::now().checked_add(Duration::from_millis(millis))).flatten()
}

/// None: the deadline and `grace` have passed first.
pub(super) async fn until<T>(deadline: Option<Instant>, grace: Duration, future: impl Future<Output = T>) -> Option<T> {
    match deadline {
        None => Some(future.await),
        Some(deadline) => tokio::time::timeout_at((deadline + grace).into(), future).await.ok(),
    }
}

pub(super) fn is_past(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}

impl Database {
    /// The same handle, whose calls end `timeout` after they began: what has not begun by then does not begin
    /// ([`WriteError::Timeout`](crate::WriteError::Timeout)), a statement that runs is interrupted and rolled back, and a write that is on
    /// its way through Raft is waited for a little longer before its outcome is unknown. A stream of rows ends with it, too.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { timeout: Some(timeout), ..self.clone() }
    }

    /// Of a call that begins now.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.timeout.and_then(|timeout| Instant::now().checked_add(timeout))
    }
}
