//! Searching the keys of a node without looking at most of them.
//!
//! The keys of a node share a prefix, which is skipped; of what follows, eight bytes of each key stand side by side as
//! numbers that order as the keys do. A search compares the prefix once, then numbers, and looks at whole keys only where
//! those are equal. Keys lie scattered in memory: what is saved is a cache miss for each step of the search.

use std::cmp::Ordering;

/// Bytes of a head.
const HEAD: usize = 8;

/// What keys of a tree are ordered by.
pub(crate) trait Key: Ord {
    /// Bytes that both start with; 0 for what is no string of bytes.
    fn shared(&self, other: &Self) -> usize;
    /// What follows the first `skip` bytes, so far as it has room. If `a.head(n) < b.head(n)` for keys that share n
    /// bytes, then `a < b`.
    fn head(&self, skip: usize) -> u64;
    /// Order by the first `skip` bytes alone, of which `other` has that many.
    fn cmp_prefix(&self, other: &Self, skip: usize) -> Ordering;
}

impl Key for [u8] {
    fn shared(&self, other: &[u8]) -> usize {
        self.iter().zip(other).take_while(|(a, b)| a == b).count()
    }

    fn head(&self, skip: usize) -> u64 {
        match self.get(skip..skip + HEAD).and_then(|bytes| bytes.try_into().ok()) {
            Some(bytes) => u64::from_be_bytes(bytes),
            None => {
                let rest = self.get(skip..).unwrap_or(&[]);
                let mut bytes = [0; HEAD];
                bytes[..rest.len()].copy_from_slice(rest);
                u64::from_be_bytes(bytes)
            }
        }
    }

    fn cmp_prefix(&self, other: &[u8], skip: usize) -> Ordering {
        self[..self.len().min(skip)].cmp(&other[..skip])
    }
}

impl Key for i64 {
    fn shared(&self, _: &i64) -> usize {
        0
    }
    fn head(&self, _: usize) -> u64 {
        self.cast_unsigned() ^ (1 << 63)
    }
    fn cmp_prefix(&self, _: &i64, _: usize) -> Ordering {
        Ordering::Equal
    }
}

/// See the module. Which keys these are, the caller knows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Heads {
    skip: usize,
    heads: Vec<u64>,
}

impl Heads {
    /// Of keys that ascend.
    pub(crate) fn of<'k, K: Key + ?Sized + 'k>(
        keys: impl ExactSizeIterator<Item = &'k K> + Clone,
        room: usize,
    ) -> Heads {
        let (mut skip, mut first) = (0, None);
        for key in keys.clone() {
            skip = first.map_or_else(|| key.shared(key), |first: &K| skip.min(first.shared(key)));
            first = first.or(Some(key));
        }
        let mut heads = Vec::with_capacity(keys.len() + room);
        heads.extend(keys.map(|key| key.head(skip)));
        Heads { skip, heads }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.heads.len()
    }

    /// Where `key` is, or where it would have to be inserted, among the keys that `nth` gives.
    pub(crate) fn search<'k, K: Key + ?Sized + 'k>(
        &self,
        key: &K,
        nth: impl Fn(usize) -> &'k K,
    ) -> Result<usize, usize> {
        if self.heads.is_empty() {
            return Err(0);
        }
        if self.skip > 0 {
            match key.cmp_prefix(nth(0), self.skip) {
                Ordering::Less => return Err(0),
                Ordering::Greater => return Err(self.heads.len()),
                Ordering::Equal => {}
            }
        }
        let head = key.head(self.skip);
        let (mut low, mut high) = (self.heads.partition_point(|h| *h < head), self.heads.len());
        // Among equal heads, of which there are few, by whole keys.
        if self.heads.get(low) != Some(&head) {
            return Err(low);
        }
        high = low + self.heads[low..high].partition_point(|h| *h == head);
        while low < high {
            let middle = low + (high - low) / 2;
            match nth(middle).cmp(key) {
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
                Ordering::Equal => return Ok(middle),
            }
        }
        Err(low)
    }

    /// Notes a key that comes in at `at`; `other` is any of the others. False if it has not their prefix: then all have
    /// to be noted anew.
    pub(crate) fn insert<K: Key + ?Sized>(&mut self, at: usize, key: &K, other: &K) -> bool {
        let fits = key.shared(other) >= self.skip;
        if fits {
            self.heads.insert(at, key.head(self.skip));
        }
        fits
    }

    pub(crate) fn remove(&mut self, at: usize) {
        self.heads.remove(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let key = (prop_oneof!["", "/a/", "/a/long/prefix/", "/a/long/prefix/and/more"], "[ab\0]{0,12}")
            .prop_map(|(prefix, rest)| (prefix + &rest).into_bytes());
        proptest::collection::btree_set(key, 0..24).prop_map(|set| set.into_iter().collect())
    }

    proptest! {
        #[test]
        fn finds_what_a_plain_search_finds(keys in keys(), more in keys()) {
            let heads = Heads::of(keys.iter().map(Vec::as_slice), 0);
            for key in keys.iter().chain(&more) {
                prop_assert_eq!(heads.search(key.as_slice(), |n| keys[n].as_slice()), keys.binary_search(key));
            }
        }

        #[test]
        fn keys_can_be_added_and_removed(keys in keys(), more in keys()) {
            let mut all: Vec<Vec<u8>> = keys;
            let mut heads = Heads::of(all.iter().map(Vec::as_slice), 4);
            for key in &more {
                match heads.search(key.as_slice(), |n| all[n].as_slice()) {
                    Ok(at) => {
                        all.remove(at);
                        heads.remove(at);
                    }
                    Err(at) => {
                        let fits = !all.is_empty() && heads.insert(at, key.as_slice(), all[0].as_slice());
                        all.insert(at, key.clone());
                        if !fits {
                            heads = Heads::of(all.iter().map(Vec::as_slice), 0);
                        }
                    }
                }
                prop_assert_eq!(heads.len(), all.len());
                for key in all.iter().chain(&more) {
                    prop_assert_eq!(heads.search(key.as_slice(), |n| all[n].as_slice()), all.binary_search(key));
                }
            }
        }

        #[test]
        fn numbers_are_found(keys in proptest::collection::btree_set(any::<i64>(), 0..20), more: Vec<i64>) {
            let keys: Vec<i64> = keys.into_iter().collect();
            let heads = Heads::of(keys.iter(), 0);
            for key in keys.iter().chain(&more) {
                prop_assert_eq!(heads.search(key, |n| &keys[n]), keys.binary_search(key));
            }
        }
    }
}
