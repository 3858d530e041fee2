//! What a pin sees.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{PageError, PageStore, Pin, PinState};
use crate::page::{Page, PageNumber, StateHash, Version};

impl Pin {
    pub fn version(&self) -> Version {
        self.state.version
    }

    pub fn hash(&self) -> StateHash {
        self.hash
    }

    pub fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    /// An error once the pin counts no more. To be asked after a page was looked up.
    pub(super) fn check(&self) -> Result<(), PageError> {
        match self.state.expired.get() {
            Some(bound) => Err(PageError::TooOld(*bound)),
            None => Ok(()),
        }
    }

    pub fn page(&self, number: PageNumber) -> Result<Option<Arc<Page>>, PageError> {
        let page = self.store.find_page(number, self.version());
        // First: once the pin counts no more, the file may have another image by now.
        self.check()?;
        Ok(self.store.noted(page)?)
    }

    pub fn cached(&self, number: PageNumber) -> Option<Arc<Page>> {
        let page = self.store.cached_at(number, self.version());
        self.check().ok()?;
        page
    }

    pub fn copy(&self, number: PageNumber, offset: usize, buffer: &mut [u8]) -> Result<bool, PageError> {
        let there = self.store.find_bytes(number, self.version(), offset, buffer);
        self.check()?;
        Ok(self.store.noted(there)?)
    }

    pub fn page_count(&self) -> Result<u32, PageError> {
        if let Some(count) = self.page_count.get() {
            return Ok(*count);
        }
        let count = self.store.page_count_at(self.version())?;
        self.check()?;
        Ok(*self.page_count.get_or_init(|| count))
    }

    /// The same version, pinned a second time.
    pub fn again(&self) -> Pin {
        let mut pins = self.store.pins.lock();
        let expired = self.state.expired.clone();
        let state = Arc::new(PinState { version: self.version(), since: self.state.since, expired });
        if state.expired.get().is_none() {
            pins.by_version.entry(self.version()).or_default().push(state.clone());
        }
        Pin { store: self.store.clone(), state, hash: self.hash, page_count: self.page_count.clone() }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.store.pins.lock();
        if let Some(states) = pins.by_version.get_mut(&self.state.version) {
            states.retain(|state| !Arc::ptr_eq(state, &self.state));
            if states.is_empty() {
                pins.by_version.remove(&self.state.version);
                self.store.released.store(true, Ordering::SeqCst);
            }
        }
    }
}
