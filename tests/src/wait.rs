//! Waiting for a condition, with a deadline long enough never to be the reason of a failure on a busy machine.

use std::time::{Duration, Instant};

/// How long a condition may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Polls until `condition` gives a value.
///
/// # Errors
/// After [`PATIENCE`], with what was waited for and what the condition said last.
pub async fn until<T, F>(what: &str, mut condition: impl FnMut() -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    let start = Instant::now();
    loop {
        let error = match condition().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if start.elapsed() > PATIENCE {
            return Err(error.context(format!("waited {} s for: {what}", PATIENCE.as_secs())));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
