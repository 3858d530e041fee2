//! What has changed lately in one database of this node: for those who follow it.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::page::Version;

/// Versions whose tables are remembered for followers that are behind.
const REMEMBERED: usize = 1024;

/// The tables that a version changed; None: not known.
pub(crate) type Tables = Option<Arc<[String]>>;

/// Where a feed stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FeedState {
    pub newest: Version,
    /// The database was dropped, or the node stops.
    pub ended: bool,
}

/// One database's; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Feed {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Of versions that follow each other, the last one the newest.
    recent: Mutex<VecDeque<(Version, Tables)>>,
    state: watch::Sender<FeedState>,
}

impl Feed {
    pub fn new(newest: Version) -> Self {
        let state = watch::channel(FeedState { newest, ended: false }).0;
        Self { inner: Arc::new(Inner { recent: Mutex::default(), state }) }
    }

    /// `version`, the one after the newest, is visible to readers.
    pub fn publish(&self, version: Version, tables: Tables) {
        let mut recent = self.inner.recent.lock();
        if recent.len() == REMEMBERED {
            recent.pop_front();
        }
        recent.push_back((version, tables));
        drop(recent);
        self.inner.state.send_modify(|state| state.newest = version);
    }

    /// The whole database was replaced by that of `version`.
    pub fn replaced(&self, version: Version) {
        self.inner.recent.lock().clear();
        self.inner.state.send_modify(|state| state.newest = version);
    }

    /// Nothing comes any more.
    pub fn end(&self) {
        self.inner.state.send_modify(|state| state.ended = true);
    }

    pub fn follow(&self) -> watch::Receiver<FeedState> {
        self.inner.state.subscribe()
    }

    /// What came after `version`, in order. What is not remembered is one change to the newest version, of unknown tables.
    pub fn after(&self, version: Version) -> Vec<(Version, Tables)> {
        let recent = self.inner.recent.lock();
        let newest = self.inner.state.borrow().newest;
        match recent.front() {
            _ if version >= newest => Vec::new(),
            Some((oldest, _)) if *oldest <= version.next() => {
                recent.iter().filter(|(changed, _)| *changed > version).cloned().collect()
            }
            _ => vec![(newest, None)],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forgotten_is_one_change_of_anything() {
        let feed = Feed::new(Version(7));
        assert_eq!(feed.after(Version(7)), []);
        assert_eq!(feed.after(Version(3)), [(Version(7), None)]);
        let tables: Tables = Some(["t".to_owned()].into());
        for version in 8..8 + REMEMBERED as u64 {
            feed.publish(Version(version), tables.clone());
        }
        assert_eq!(feed.after(Version(7)).len(), REMEMBERED);
        assert_eq!(feed.after(Version(8))[0], (Version(9), tables.clone()));
        let newest = Version(8 + REMEMBERED as u64);
        feed.publish(newest, tables);
        assert_eq!(feed.after(Version(7)), [(newest, None)]);
        assert_eq!(feed.after(Version(8)).len(), REMEMBERED);
        feed.replaced(Version(9000));
        assert_eq!(feed.after(newest), [(Version(9000), None)]);
        assert_eq!(*feed.follow().borrow(), FeedState { newest: Version(9000), ended: false });
    }
}
