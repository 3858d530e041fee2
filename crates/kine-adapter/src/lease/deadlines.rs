//! When each lease ends, as the leader's clock has it. Pure: the time comes from the caller.
//!
//! ```text
//!   granted ──▶ running ──(deadline passes)──▶ expiring ──(revoke applied)──▶ gone
//!                ▲  │ renewed                     │
//!                └──┘ ◀───(the revoke failed)─────┘
//! ```
//!
//! Deadlines are kept by a monotonic clock and are never replicated: a new leader gives every lease its full TTL anew
//! (INV-LEASE-NOT-EARLY: no lease ends before its TTL has passed since the last renewal that was answered).
//! Sources: etcd server/lease/lessor.go.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use crate::kv::LeaseInfo;

/// The longest deadline that is kept: TTLs may be nine billion seconds, more than a clock can add.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// What came of a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Renewal {
    /// It runs for this many seconds from now on.
    Renewed(i64),
    /// Its deadline has passed: whether it ends is being decided.
    Expiring,
    /// There is no such lease.
    Missing,
}

/// What is known of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Remaining {
    pub granted_seconds: i64,
    /// Whole seconds left, 0 once the deadline has passed.
    pub seconds: i64,
}

#[derive(Debug, Clone, Copy)]
struct Running {
    ttl_seconds: i64,
    deadline: Instant,
    /// A revoke is on its way.
    expiring: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    leases: HashMap<i64, Running>,
    /// Those that are not expiring.
    by_deadline: BTreeSet<(Instant, i64)>,
}

impl Deadlines {
    /// A lease runs for its TTL from now on; nothing if it is known already.
    pub fn add(&mut self, lease: LeaseInfo, now: Instant, extension: Duration) {
        if self.leases.contains_key(&lease.id) {
            return;
        }
        let deadline = deadline(lease.ttl_seconds, now) + extension;
        self.leases.insert(lease.id, Running { ttl_seconds: lease.ttl_seconds, deadline, expiring: false });
        self.by_deadline.insert((deadline, lease.id));
    }

    /// The lease is gone.
    pub fn remove(&mut self, id: i64) {
        if let Some(lease) = self.leases.remove(&id) {
            self.by_deadline.remove(&(lease.deadline, id));
        }
    }

    /// The lease runs for its TTL from now on.
    pub fn renew(&mut self, id: i64, now: Instant) -> Renewal {
        let Some(lease) = self.leases.get_mut(&id) else {
            return Renewal::Missing;
        };
        if lease.expiring || lease.deadline <= now {
            return Renewal::Expiring;
        }
        self.by_deadline.remove(&(lease.deadline, id));
        lease.deadline = deadline(lease.ttl_seconds, now);
        self.by_deadline.insert((lease.deadline, id));
        Renewal::Renewed(lease.ttl_seconds)
    }

    /// How long the lease still runs.
    pub fn remaining(&self, id: i64, now: Instant) -> Option<Remaining> {
        let lease = self.leases.get(&id)?;
        let left = lease.deadline.saturating_duration_since(now);
        let seconds = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
        Some(Remaining { granted_seconds: lease.ttl_seconds, seconds: seconds.min(lease.ttl_seconds) })
    }

    /// At most `limit` leases whose deadline has passed, the earliest first; they are expiring from now on.
    pub fn take_due(&mut self, now: Instant, limit: usize) -> Vec<i64> {
        let due: Vec<(Instant, i64)> =
            self.by_deadline.iter().take_while(|(at, _)| *at <= now).take(limit).copied().collect();
        for entry in &due {
            self.by_deadline.remove(entry);
            if let Some(lease) = self.leases.get_mut(&entry.1) {
                lease.expiring = true;
            }
        }
        due.into_iter().map(|(_, id)| id).collect()
    }

    /// The revoke failed: the lease is due again at once.
    pub fn give_back(&mut self, id: i64) {
        if let Some(lease) = self.leases.get_mut(&id)
            && std::mem::take(&mut lease.expiring)
        {
            self.by_deadline.insert((lease.deadline, id));
        }
    }

    /// Every lease, the one that ends first in front.
    pub fn ids_by_deadline(&self) -> Vec<i64> {
        let mut all: Vec<(Instant, i64)> = self.leases.iter().map(|(id, lease)| (lease.deadline, *id)).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, id)| id).collect()
    }

    /// Number of leases.
    pub fn len(&self) -> usize {
        self.leases.len()
    }
}

fn deadline(ttl_seconds: i64, now: Instant) -> Instant {
    now + Duration::from_secs(u64::try_from(ttl_seconds).unwrap_or(0)).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(id: i64, ttl_seconds: i64) -> LeaseInfo {
        LeaseInfo { id, ttl_seconds }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_lease_ends_after_its_ttl_and_not_before() {
        let now = Instant::now();
        let mut deadlines = Deadlines::default();
        deadlines.add(lease(1, 10), now, Duration::ZERO);
        deadlines.add(lease(2, 5), now, Duration::ZERO);
        assert_eq!(deadlines.take_due(now + seconds(5) - Duration::from_nanos(1), 9), Vec::<i64>::new());
        assert_eq!(deadlines.take_due(now + seconds(10), 1), [2]);
        assert_eq!(deadlines.take_due(now + seconds(10), 9), [1]);
        assert_eq!(deadlines.take_due(now + seconds(99), 9), Vec::<i64>::new());
    }

    #[test]
    fn renewal_gives_the_full_ttl_again() {
        let now = Instant::now();
        let mut deadlines = Deadlines::default();
        deadlines.add(lease(1, 10), now, Duration::ZERO);
        assert_eq!(deadlines.renew(1, now + seconds(9)), Renewal::Renewed(10));
        let remaining = deadlines.remaining(1, now + seconds(12));
        assert_eq!(remaining, Some(Remaining { granted_seconds: 10, seconds: 7 }));
        assert_eq!(deadlines.take_due(now + seconds(18), 9), Vec::<i64>::new());
        assert_eq!(deadlines.take_due(now + seconds(19), 9), [1]);
    }

    #[test]
    fn what_has_expired_is_not_renewed_until_its_revoke_has_failed() {
        let now = Instant::now();
        let mut deadlines = Deadlines::default();
        deadlines.add(lease(1, 10), now, Duration::ZERO);
        // Past the deadline, though nobody has looked yet.
        assert_eq!(deadlines.renew(1, now + seconds(10)), Renewal::Expiring);
        assert_eq!(deadlines.take_due(now + seconds(10), 9), [1]);
        assert_eq!(deadlines.renew(1, now), Renewal::Expiring);
        deadlines.give_back(1);
        assert_eq!(deadlines.take_due(now + seconds(10), 9), [1]);
        deadlines.remove(1);
        assert_eq!(deadlines.renew(1, now), Renewal::Missing);
        deadlines.give_back(1);
        assert_eq!(deadlines.take_due(now + seconds(10), 9), Vec::<i64>::new());
    }

    #[test]
    fn a_new_leader_adds_its_extension_and_known_leases_keep_their_deadline() {
        let now = Instant::now();
        let mut deadlines = Deadlines::default();
        deadlines.add(lease(1, 10), now, seconds(1));
        deadlines.add(lease(1, 10), now + seconds(5), seconds(1));
        assert_eq!(deadlines.take_due(now + seconds(10), 9), Vec::<i64>::new());
        assert_eq!(deadlines.remaining(1, now).map(|r| r.seconds), Some(10));
        assert_eq!(deadlines.take_due(now + seconds(11), 9), [1]);
    }

    #[test]
    fn nine_billion_seconds_are_bearable() {
        let now = Instant::now();
        let mut deadlines = Deadlines::default();
        deadlines.add(lease(1, 9_000_000_000), now, seconds(1));
        assert_eq!(deadlines.renew(1, now), Renewal::Renewed(9_000_000_000));
        assert_eq!(deadlines.len(), 1);
        assert_eq!(deadlines.ids_by_deadline(), [1]);
    }
}
