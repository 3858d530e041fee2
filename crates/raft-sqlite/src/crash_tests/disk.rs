//! One disk in memory under the log and the databases, with one clock of operations.
//!
//! It keeps apart what programs see and what is on the platters. [`State::after_power_loss`] makes the disk as it could be found after
//! a power failure: what was synced is there; each 512-byte sector written since is at any of its states since, a change of a file's
//! length happened or not; of the changes of names since the last sync of their folder a first part has happened.

use std::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::StdRng;

use crate::log::LogError;
use crate::log::disk::{Disk as LogDisk, DiskFile as LogFile};
use crate::page::source::{Disk, DiskFile};

const SECTOR_BYTES: usize = 512;
const EIO: i32 = 5;

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    SetLength(usize),
}

/// A file's content on the platters, and what is on its way there.
#[derive(Clone, Debug, Default)]
struct Content {
    seen: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
}

fn write_into(bytes: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[offset..end].copy_from_slice(data);
}

/// Which part of the unsynced changes a power failure leaves.
#[derive(Clone, Copy)]
enum Style {
    Nothing,
    Everything,
    /// Each sector: a first part of what was written to it.
    Torn,
    /// Each change whole or not at all, whatever became of those before it.
    Reordered,
}

impl Content {
    fn after_power_loss(&self, style: Style, random: &mut StdRng) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        let mut stopped: BTreeMap<usize, bool> = BTreeMap::new();
        for change in &self.pending {
            match (style, change) {
                (Style::Nothing, _) => {}
                (Style::Everything, Change::Write(offset, data)) => write_into(&mut bytes, *offset, data),
                (Style::Everything, Change::SetLength(length)) => bytes.resize(*length, 0),
                (Style::Reordered, Change::Write(offset, data)) => {
                    if random.random() {
                        write_into(&mut bytes, *offset, data);
                    }
                }
                (Style::Torn | Style::Reordered, Change::SetLength(length)) => {
                    if random.random() {
                        bytes.resize(*length, 0);
                    }
                }
                (Style::Torn, Change::Write(offset, data)) => {
                    let mut done = 0;
                    while done < data.len() {
                        let at = offset + done;
                        let count = (SECTOR_BYTES - at % SECTOR_BYTES).min(data.len() - done);
                        let stopped = stopped.entry(at / SECTOR_BYTES).or_insert(false);
                        *stopped = *stopped || random.random();
                        if !*stopped {
                            write_into(&mut bytes, at, &data[done..done + count]);
                        }
                        done += count;
                    }
                }
            }
        }
        bytes
    }
}

#[derive(Clone, Debug)]
enum NameChange {
    Add(PathBuf, usize),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

impl NameChange {
    fn path(&self) -> &Path {
        let (Self::Add(path, _) | Self::Rename(_, path) | Self::Remove(path)) = self;
        path
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Self::Add(path, file) => {
                names.insert(path.clone(), *file);
            }
            Self::Rename(from, to) => {
                if let Some(file) = names.remove(from) {
                    names.insert(to.clone(), file);
                }
            }
            Self::Remove(path) => {
                names.remove(path);
            }
        }
    }
}

/// Everything on the disk; a clone shares what does not change.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    files: Vec<Arc<Content>>,
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    pending_names: Vec<NameChange>,
}

impl State {
    /// The disk as it could be after a power failure now.
    pub(super) fn after_power_loss(&self, random: &mut StdRng) -> SimulatedDisk {
        let style = match random.random_range(0..6) {
            0 => Style::Nothing,
            1 => Style::Everything,
            2 => Style::Reordered,
            _ => Style::Torn,
        };
        let mut names = self.durable_names.clone();
        // Each folder's changes happen in their order; folders know nothing of each other.
        let mut kept: BTreeMap<&Path, usize> = BTreeMap::new();
        for change in &self.pending_names {
            let folder = change.path().parent().unwrap_or(Path::new(""));
            let count = self.pending_names.iter().filter(|other| other.path().parent() == Some(folder)).count();
            let left = kept.entry(folder).or_insert_with(|| match style {
                Style::Nothing => 0,
                Style::Everything => count,
                _ => random.random_range(0..=count),
            });
            if *left > 0 {
                *left -= 1;
                change.apply(&mut names);
            }
        }
        let mut files = Vec::new();
        let mut new_names = BTreeMap::new();
        for (path, file) in names {
            let bytes = self.files[file].after_power_loss(style, random);
            new_names.insert(path, files.len());
            files.push(Arc::new(Content { seen: bytes.clone(), durable: bytes, pending: Vec::new() }));
        }
        let state = State { files, names: new_names.clone(), durable_names: new_names, pending_names: Vec::new() };
        SimulatedDisk::from_state(state)
    }
}

/// Called before each change with the disk as it is.
type Hook = Box<dyn FnMut(&State) + Send>;

#[derive(Default)]
struct Shared {
    state: State,
    hook: Option<Hook>,
    operations: u64,
    /// Operations left until the power goes.
    power: Option<u64>,
    /// Nothing grows from this operation on, until so many attempts have failed.
    full: Option<(u64, u64)>,
    refused: u64,
    /// The operation with this number, from 0, fails; the next one may go well.
    faulty: Option<u64>,
    faults: u64,
    locked: bool,
}

impl Shared {
    /// One tick of the clock.
    fn step(&mut self) -> io::Result<()> {
        if let Some(left) = &mut self.power {
            if *left == 0 {
                return Err(io::Error::other("the power is out"));
            }
            *left -= 1;
        }
        self.operations += 1;
        if self.faulty == Some(self.operations - 1) {
            self.faults += 1;
            return Err(io::Error::from_raw_os_error(EIO));
        }
        if let Some(hook) = &mut self.hook {
            hook(&self.state);
        }
        Ok(())
    }

    fn take_room(&mut self) -> io::Result<()> {
        match &mut self.full {
            Some((from, attempts)) if self.operations > *from && *attempts > 0 => {
                *attempts -= 1;
                self.refused += 1;
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => Ok(()),
        }
    }

    fn content(&mut self, file: usize) -> &mut Content {
        Arc::make_mut(&mut self.state.files[file])
    }

    fn change_name(&mut self, change: NameChange) {
        change.apply(&mut self.state.names);
        self.state.pending_names.push(change);
    }

    fn add(&mut self, path: PathBuf) -> usize {
        self.state.files.push(Arc::default());
        let file = self.state.files.len() - 1;
        self.change_name(NameChange::Add(path, file));
        file
    }
}

/// A clone is the same disk.
#[derive(Clone, Default)]
pub(super) struct SimulatedDisk {
    shared: Arc<Mutex<Shared>>,
}

impl SimulatedDisk {
    pub(super) fn from_state(state: State) -> Self {
        Self { shared: Arc::new(Mutex::new(Shared { state, ..Shared::default() })) }
    }

    pub(super) fn set_hook(&self, hook: impl FnMut(&State) + Send + 'static) {
        self.shared.lock().hook = Some(Box::new(hook));
    }

    pub(super) fn clear_hook(&self) {
        self.shared.lock().hook = None;
    }

    pub(super) fn state(&self) -> State {
        self.shared.lock().state.clone()
    }

    /// Writes, syncs and changes of names so far.
    pub(super) fn operations(&self) -> u64 {
        self.shared.lock().operations
    }

    /// The power goes after so many operations; None: it stays.
    pub(super) fn set_power(&self, operations: Option<u64>) {
        self.shared.lock().power = operations;
    }

    /// After `operations` in all, `attempts` times something that needs room finds none.
    pub(super) fn set_full(&self, operations: u64, attempts: u64) {
        self.shared.lock().full = Some((operations, attempts));
    }

    /// How often something found no room.
    pub(super) fn refused(&self) -> u64 {
        self.shared.lock().refused
    }

    /// The operation after so many fails once.
    pub(super) fn set_faulty(&self, operations: u64) {
        self.shared.lock().faulty = Some(operations);
    }

    /// How often one has failed.
    pub(super) fn faults(&self) -> u64 {
        self.shared.lock().faults
    }

    fn file(&self, file: usize) -> SimulatedFile {
        SimulatedFile { shared: self.shared.clone(), file }
    }
}

struct SimulatedFile {
    shared: Arc<Mutex<Shared>>,
    file: usize,
}

impl std::fmt::Debug for SimulatedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "simulated file {}", self.file)
    }
}

impl DiskFile for SimulatedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let shared = self.shared.lock();
        let bytes = shared.state.files[self.file].seen.get(offset as usize..).unwrap_or_default();
        let count = buffer.len().min(bytes.len());
        buffer[..count].copy_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut shared = self.shared.lock();
        shared.step()?;
        let offset = offset as usize;
        let grows = offset + bytes.len() > shared.state.files[self.file].seen.len();
        let room = if grows { shared.take_room() } else { Ok(()) };
        // What there is room for is written all the same.
        let bytes = if room.is_err() { &bytes[..bytes.len() / 2] } else { bytes };
        let content = shared.content(self.file);
        write_into(&mut content.seen, offset, bytes);
        content.pending.push(Change::Write(offset, bytes.to_vec()));
        room
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let mut shared = self.shared.lock();
        shared.step()?;
        let length = length as usize;
        let content = shared.content(self.file);
        content.seen.resize(length, 0);
        content.pending.push(Change::SetLength(length));
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.shared.lock().state.files[self.file].seen.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        let mut shared = self.shared.lock();
        let synced = shared.step();
        let content = shared.content(self.file);
        for change in std::mem::take(&mut content.pending) {
            match change {
                // What a failed sync did not bring there is nobody's concern any more: the next one has nothing to do, and goes well.
                _ if synced.is_err() => {}
                Change::Write(offset, data) => write_into(&mut content.durable, offset, &data),
                Change::SetLength(length) => content.durable.resize(length, 0),
            }
        }
        synced
    }
}

impl LogFile for SimulatedFile {
    fn length(&self) -> io::Result<u64> {
        DiskFile::length(self)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match DiskFile::read_at(self, buffer, offset)? {
            count if count == buffer.len() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        DiskFile::write_at(self, bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        DiskFile::sync(self)
    }
}

impl Disk for SimulatedDisk {
    fn make_folder(&self, _folder: &Path) -> io::Result<()> {
        Ok(())
    }

    fn open(&self, path: &Path, create: bool) -> io::Result<Option<Arc<dyn DiskFile>>> {
        let mut shared = self.shared.lock();
        let file = match shared.state.names.get(path) {
            Some(file) => *file,
            None if !create => return Ok(None),
            None => {
                shared.step()?;
                shared.take_room()?;
                shared.add(path.to_owned())
            }
        };
        Ok(Some(Arc::new(self.file(file))))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut shared = self.shared.lock();
        shared.step()?;
        if !shared.state.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        shared.change_name(NameChange::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut shared = self.shared.lock();
        shared.step()?;
        if shared.state.names.contains_key(path) {
            shared.change_name(NameChange::Remove(path.to_owned()));
        }
        Ok(())
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        let mut shared = self.shared.lock();
        shared.step()?;
        let State { durable_names, pending_names, .. } = &mut shared.state;
        pending_names.retain(|change| {
            let here = change.path().parent() == Some(folder);
            if here {
                change.apply(durable_names);
            }
            !here
        });
        Ok(())
    }
}

/// The log's folder on a simulated disk.
pub(super) struct LogFolder {
    pub(super) disk: SimulatedDisk,
    pub(super) folder: PathBuf,
}

impl std::fmt::Debug for LogFolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a folder of a simulated disk")
    }
}

struct Lock(Arc<Mutex<Shared>>);

impl Drop for Lock {
    fn drop(&mut self) {
        self.0.lock().locked = false;
    }
}

impl LogDisk for LogFolder {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn lock(&self) -> Result<Box<dyn Any + Send>, LogError> {
        let mut shared = self.disk.shared.lock();
        if shared.locked {
            return Err(LogError::Locked { directory: self.folder.clone(), owner: None });
        }
        shared.locked = true;
        Ok(Box::new(Lock(self.disk.shared.clone())))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let shared = self.disk.shared.lock();
        let here = shared.state.names.keys().filter(|path| path.parent() == Some(&*self.folder));
        Ok(here.filter_map(|path| path.file_name()?.to_str().map(str::to_owned)).collect())
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        let file = *self.disk.shared.lock().state.names.get(&self.path(name)).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(self.disk.file(file)))
    }

    fn create(&self, name: &str, length: u64) -> io::Result<Arc<dyn LogFile>> {
        let mut shared = self.disk.shared.lock();
        shared.step()?;
        if shared.state.names.contains_key(&self.path(name)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        shared.take_room()?;
        let file = shared.add(self.path(name));
        let content = shared.content(file);
        content.seen = vec![0; length as usize];
        content.pending.push(Change::SetLength(length as usize));
        Ok(Arc::new(self.disk.file(file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Disk::rename(&self.disk, &self.path(from), &self.path(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        Disk::remove(&self.disk, &self.path(name))
    }

    fn sync_directory(&self) -> io::Result<()> {
        Disk::sync_folder(&self.disk, &self.folder)
    }
}
