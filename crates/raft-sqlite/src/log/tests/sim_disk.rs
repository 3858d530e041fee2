//! A disk in memory that can fail, fill up and forget.
//!
//! It keeps apart what the kernel shows and what is on the platter. [`SimDisk::after_power_loss`]
//! makes the disk that could be found after a power failure: synced bytes are there; each 512-byte
//! sector written since is at any of its states since; of the changes to names since the last
//! directory sync a first part has happened. A failed sync forgets what it should have written
//! while the kernel goes on showing it, as Linux does.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::StdRng;

use crate::log::LogError;
use crate::log::disk::{Disk, DiskFile};

const SECTOR_BYTES: usize = 512;

/// Called before each change with the disk as it is and what the change is.
type Hook = Box<dyn FnMut(&State, &'static str) + Send>;

#[derive(Clone)]
pub(super) struct SimDisk {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    state: State,
    hook: Option<Hook>,
    before_read: Option<Arc<dyn Fn() + Send + Sync>>,
    faults: Faults,
    locked: bool,
}

/// Which calls are to fail; each is counted down.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    /// The n-th write from now on writes half and fails.
    pub(super) write: Option<u32>,
    /// The n-th sync of a file from now on fails.
    pub(super) sync: Option<u32>,
    /// Room for file contents in bytes.
    pub(super) capacity: Option<u64>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct State {
    files: HashMap<u64, Content>,
    next_file: u64,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    /// Changes of names since the last directory sync.
    renames: Vec<NameChange>,
}

#[derive(Clone, Debug)]
enum NameChange {
    Add(String, u64),
    Rename(String, String),
    Remove(String),
}

#[derive(Clone, Debug, Default)]
struct Content {
    shown: Vec<u8>,
    /// `None` until the first sync: then even the length may be lost.
    durable: Option<Vec<u8>>,
    /// Writes since the last sync.
    pending: Vec<(usize, Vec<u8>)>,
}

fn apply(names: &mut BTreeMap<String, u64>, change: &NameChange) {
    match change {
        NameChange::Add(name, file) => {
            names.insert(name.clone(), *file);
        }
        NameChange::Rename(from, to) => {
            if let Some(file) = names.remove(from) {
                names.insert(to.clone(), file);
            }
        }
        NameChange::Remove(name) => {
            names.remove(name);
        }
    }
}

impl Content {
    fn after_power_loss(&self, random: &mut StdRng) -> Vec<u8> {
        let Some(durable) = &self.durable else {
            return if random.random() { vec![0; self.shown.len()] } else { Vec::new() };
        };
        let mut bytes = durable.clone();
        // All lost, all kept, or sector by sector.
        let style = random.random_range(0..4);
        let mut by_sector: BTreeMap<usize, Vec<(usize, &[u8])>> = BTreeMap::new();
        for (offset, written) in &self.pending {
            let mut done = 0;
            while done < written.len() {
                let at = offset + done;
                let count = (SECTOR_BYTES - at % SECTOR_BYTES).min(written.len() - done);
                by_sector.entry(at / SECTOR_BYTES).or_default().push((at, &written[done..done + count]));
                done += count;
            }
        }
        for writes in by_sector.values() {
            let kept = match style {
                0 => 0,
                1 => writes.len(),
                _ => random.random_range(0..=writes.len()),
            };
            for (at, written) in &writes[..kept] {
                bytes[*at..at + written.len()].copy_from_slice(written);
            }
        }
        bytes
    }
}

impl State {
    /// The disk as it could be after a power failure now.
    pub(super) fn after_power_loss(&self, random: &mut StdRng) -> SimDisk {
        let mut names = self.durable_names.clone();
        for change in &self.renames[..random.random_range(0..=self.renames.len())] {
            apply(&mut names, change);
        }
        // In the order of names: a seed means the same disk each time.
        let files = names
            .values()
            .map(|file| {
                let bytes = self.files[file].after_power_loss(random);
                (*file, Content { shown: bytes.clone(), durable: Some(bytes), pending: Vec::new() })
            })
            .collect();
        SimDisk::from_state(State {
            files,
            next_file: self.next_file,
            durable_names: names.clone(),
            names,
            renames: Vec::new(),
        })
    }

    /// The disk as another process finds it when this one is killed.
    pub(super) fn after_kill(&self) -> SimDisk {
        SimDisk::from_state(self.clone())
    }
}

impl SimDisk {
    pub(super) fn new() -> Self {
        Self::from_state(State::default())
    }

    fn from_state(state: State) -> Self {
        let shared = Shared { state, hook: None, before_read: None, faults: Faults::default(), locked: false };
        Self { shared: Arc::new(Mutex::new(shared)) }
    }

    pub(super) fn state(&self) -> State {
        self.shared.lock().state.clone()
    }

    pub(super) fn set_hook(&self, hook: impl FnMut(&State, &'static str) + Send + 'static) {
        self.shared.lock().hook = Some(Box::new(hook));
    }

    /// Runs before each read, in the reader's thread; it may use the log.
    pub(super) fn set_before_read(&self, hook: impl Fn() + Send + Sync + 'static) {
        self.shared.lock().before_read = Some(Arc::new(hook));
    }

    pub(super) fn clear_hook(&self) {
        self.shared.lock().hook = None;
    }

    pub(super) fn set_faults(&self, faults: Faults) {
        self.shared.lock().faults = faults;
    }

    /// All files with what the kernel shows.
    pub(super) fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        let shared = self.shared.lock();
        let state = &shared.state;
        state.names.iter().map(|(name, file)| (name.clone(), state.files[file].shown.clone())).collect()
    }

    /// Changes a file behind the log's back.
    pub(super) fn tamper(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut shared = self.shared.lock();
        let file = shared.state.names[name];
        let content = shared.state.files.get_mut(&file).unwrap();
        change(&mut content.shown);
        content.durable = Some(content.shown.clone());
        content.pending.clear();
    }

    pub(super) fn remove_behind(&self, name: &str) {
        let mut shared = self.shared.lock();
        shared.state.names.remove(name).unwrap();
        shared.state.durable_names.remove(name);
    }
}

impl Shared {
    fn before(&mut self, what: &'static str) {
        if let Some(hook) = &mut self.hook {
            hook(&self.state, what);
        }
    }

    fn change_names(&mut self, change: NameChange) {
        apply(&mut self.state.names, &change);
        self.state.renames.push(change);
    }
}

/// Counts a fault down; true when it strikes.
fn strikes(fault: &mut Option<u32>) -> bool {
    match fault {
        Some(0) => {
            *fault = None;
            true
        }
        Some(left) => {
            *left -= 1;
            false
        }
        None => false,
    }
}

struct SimLock(Arc<Mutex<Shared>>);

impl Drop for SimLock {
    fn drop(&mut self) {
        self.0.lock().locked = false;
    }
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a simulated disk")
    }
}

impl Disk for SimDisk {
    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/sim").join(name)
    }

    fn lock(&self) -> Result<Box<dyn Any + Send>, LogError> {
        let mut shared = self.shared.lock();
        if shared.locked {
            return Err(LogError::Locked { directory: self.path(""), owner: None });
        }
        shared.locked = true;
        Ok(Box::new(SimLock(Arc::clone(&self.shared))))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.shared.lock().state.names.keys().cloned().collect())
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = *self.shared.lock().state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile { shared: Arc::clone(&self.shared), file }))
    }

    fn create(&self, name: &str, length: u64) -> io::Result<Arc<dyn DiskFile>> {
        let mut shared = self.shared.lock();
        shared.before("create");
        if shared.state.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let used: u64 = shared.state.names.values().map(|file| shared.state.files[file].shown.len() as u64).sum();
        if shared.faults.capacity.is_some_and(|capacity| used + length > capacity) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file = shared.state.next_file;
        shared.state.next_file += 1;
        shared.state.files.insert(file, Content { shown: vec![0; length as usize], ..Content::default() });
        shared.change_names(NameChange::Add(name.to_owned(), file));
        Ok(Arc::new(SimFile { shared: Arc::clone(&self.shared), file }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut shared = self.shared.lock();
        shared.before("rename");
        if !shared.state.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        shared.change_names(NameChange::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut shared = self.shared.lock();
        shared.before("remove");
        if !shared.state.names.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        shared.change_names(NameChange::Remove(name.to_owned()));
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        let mut shared = self.shared.lock();
        shared.before("sync_directory");
        shared.state.renames.clear();
        shared.state.durable_names = shared.state.names.clone();
        Ok(())
    }
}

struct SimFile {
    shared: Arc<Mutex<Shared>>,
    file: u64,
}

impl std::fmt::Debug for SimFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "simulated file {}", self.file)
    }
}

impl DiskFile for SimFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.shared.lock().state.files[&self.file].shown.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let before_read = self.shared.lock().before_read.clone();
        if let Some(before_read) = before_read {
            before_read();
        }
        let shared = self.shared.lock();
        let bytes = shared.state.files[&self.file].shown.get(offset as usize..).unwrap_or_default();
        let bytes = bytes.get(..buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut shared = self.shared.lock();
        shared.before("write");
        let fails = strikes(&mut shared.faults.write);
        let bytes = if fails { &bytes[..bytes.len() / 2] } else { bytes };
        let content = shared.state.files.get_mut(&self.file).unwrap();
        let offset = offset as usize;
        assert!(offset + bytes.len() <= content.shown.len(), "a write beyond the room that was reserved");
        content.shown[offset..offset + bytes.len()].copy_from_slice(bytes);
        content.pending.push((offset, bytes.to_vec()));
        if fails { Err(io::Error::other("simulated write error")) } else { Ok(()) }
    }

    fn sync(&self) -> io::Result<()> {
        let mut shared = self.shared.lock();
        shared.before("sync");
        let fails = strikes(&mut shared.faults.sync);
        let content = shared.state.files.get_mut(&self.file).unwrap();
        if fails {
            content.durable.get_or_insert_with(|| vec![0; content.shown.len()]);
            content.pending.clear();
            return Err(io::Error::other("simulated sync error"));
        }
        // Not all that is shown: what an earlier failed sync forgot stays forgotten.
        let mut durable = content.durable.take().unwrap_or_else(|| vec![0; content.shown.len()]);
        for (offset, bytes) in content.pending.drain(..) {
            durable[offset..offset + bytes.len()].copy_from_slice(&bytes);
        }
        content.durable = Some(durable);
        Ok(())
    }
}
