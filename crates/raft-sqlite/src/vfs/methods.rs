//! The C functions that SQLite calls.
//!
//! Each one takes its file's state from behind the `sqlite3_file`, does its work in safe code, and catches panics: none crosses into
//! SQLite (INV-NO-PANIC-ACROSS-FFI). SQLite calls the functions of one connection from one thread at a time.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;
use rusqlite::ffi::{self, *};

use super::capture::{Capture, Refused};
use super::refuse;
use crate::page::store::{PageError, PageStore, Pin, PinBound};
use crate::page::{Page, PageDamage, PageMap, PageNumber, Version};

/// The name the VFS is registered under.
pub(super) const VFS_NAME: &str = "raft-sqlite";
/// A file control of ours: from now on the PRAGMAs of `refuse` are refused.
const FILE_CONTROL_SEAL: c_int = 0x5ea1;
/// Where page 1 keeps its read and write version, change counter and version-valid-for.
const FORMAT_VERSIONS_AT: usize = 18;
const CHANGE_COUNTER_AT: usize = 24;
const VERSION_VALID_FOR_AT: usize = 92;

/// What a name opens.
pub(super) enum View {
    Writer(Arc<Capture>),
    Reader { store: Arc<PageStore>, progress: Arc<Mutex<ReadProgress>> },
}

/// What a reader connection is at.
#[derive(Clone, Debug, Default)]
pub(super) struct ReadProgress {
    /// The version that it has pinned.
    pub pinned: Option<Version>,
    /// It asked for a page after its pin had become too old: the bound.
    pub too_old: Option<PinBound>,
    /// It asked for a page that is damaged.
    pub damaged: Option<PageDamage>,
}

struct Name {
    view: View,
    /// Each name is for one connection: a second one, by ATTACH of a guessed name, would see the first one's private WAL.
    opened: bool,
}

static NAMES: LazyLock<Mutex<HashMap<String, Name>>> = LazyLock::new(Mutex::default);
static NEXT_NAME: AtomicU64 = AtomicU64::new(1);

/// A name that stands until this is dropped.
pub(super) struct RegisteredName(String);

impl RegisteredName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Drop for RegisteredName {
    fn drop(&mut self) {
        NAMES.lock().remove(&self.0);
    }
}

/// Gives a view a name of its own.
pub(super) fn register(view: View) -> rusqlite::Result<RegisteredName> {
    static VFS: LazyLock<c_int> = LazyLock::new(register_vfs);
    if *VFS != SQLITE_OK {
        return Err(rusqlite::Error::SqliteFailure(ffi::Error::new(*VFS), Some("the VFS was not registered".into())));
    }
    let name = format!("raft-sqlite-view-{}", NEXT_NAME.fetch_add(1, Ordering::Relaxed));
    NAMES.lock().insert(name.clone(), Name { view, opened: false });
    Ok(RegisteredName(name))
}

/// From here on the connection's forbidden PRAGMAs are refused.
pub(super) fn seal(connection: &rusqlite::Connection) -> rusqlite::Result<()> {
    // SAFETY: the handle is open for as long as `connection` is borrowed; our file control takes no argument.
    let code = unsafe { sqlite3_file_control(connection.handle(), c"main".as_ptr(), FILE_CONTROL_SEAL, null_mut()) };
    if code == SQLITE_OK {
        Ok(())
    } else {
        Err(rusqlite::Error::SqliteFailure(ffi::Error::new(code), Some("the connection could not be sealed".into())))
    }
}

/// The next caller must not see the last one's rowid.
pub(super) fn forget_last_insert_rowid(connection: &rusqlite::Connection) {
    // SAFETY: the handle is open for as long as `connection` is borrowed, and is used on this thread only.
    unsafe { sqlite3_set_last_insert_rowid(connection.handle(), 0) }
}

struct ReaderFile {
    store: Arc<PageStore>,
    pin: Option<Pin>,
    progress: Arc<Mutex<ReadProgress>>,
    lock: c_int,
    /// Images whose addresses SQLite has, with how often it was given each.
    fetched: PageMap<(Arc<Page>, usize)>,
}

enum Kind {
    Reader(ReaderFile),
    WriterMain(Arc<Capture>),
    WriterWal(Arc<Capture>),
}

struct FileState {
    kind: Kind,
    sealed: bool,
}

/// SQLite allocates this; `base` must come first.
#[repr(C)]
struct File {
    base: sqlite3_file,
    state: *mut FileState,
}

/// Runs one method on its file's state.
///
/// SAFETY: `file` must be a file that `x_open` set up and `x_close` has not taken down.
unsafe fn with(file: *mut sqlite3_file, on_panic: c_int, body: impl FnOnce(&mut FileState) -> c_int) -> c_int {
    // SAFETY: by this function's contract `file` is a `File` whose `state` came from Box::into_raw, and SQLite uses one
    // connection's files from one thread at a time, so the reference is the only one.
    let state = unsafe { &mut *(*file.cast::<File>()).state };
    catch_unwind(AssertUnwindSafe(|| body(state))).unwrap_or(on_panic)
}

fn page_at(offset: usize, page_bytes: usize) -> (PageNumber, usize) {
    (PageNumber((offset / page_bytes) as u32 + 1), offset % page_bytes)
}

/// Lays `bytes`, which belong at `at`, over a buffer that was read from `offset`.
fn patch(buffer: &mut [u8], offset: usize, at: usize, bytes: &[u8]) {
    for (index, byte) in bytes.iter().enumerate() {
        if let Some(place) = (at + index).checked_sub(offset).and_then(|place| buffer.get_mut(place)) {
            *place = *byte;
        }
    }
}

impl ReaderFile {
    /// Runs with the pin of the open read transaction, or a passing one.
    fn with_pin<T>(&self, body: impl FnOnce(&Pin) -> T) -> T {
        match &self.pin {
            Some(pin) => body(pin),
            None => body(&self.store.pin()),
        }
    }

    fn read(&self, buffer: &mut [u8], offset: usize) -> c_int {
        let (number, within) = page_at(offset, self.store.page_size().bytes());
        if within + buffer.len() > self.store.page_size().bytes() {
            return SQLITE_IOERR_READ;
        }
        self.with_pin(|pin| {
            let read = pin.page_count().and_then(|count| {
                if number.0 > count {
                    buffer.fill(0);
                    return Ok(false);
                }
                pin.copy(number, within, buffer).map(|_| true)
            });
            match read {
                Ok(there) => {
                    if number.0 == 1 {
                        // A rollback-mode database whose change counter is the version: this drives SQLite's cache.
                        let counter = (pin.version().0 as u32).to_be_bytes();
                        patch(buffer, within, FORMAT_VERSIONS_AT, &[1, 1]);
                        patch(buffer, within, CHANGE_COUNTER_AT, &counter);
                        patch(buffer, within, VERSION_VALID_FOR_AT, &counter);
                    }
                    if there { SQLITE_OK } else { SQLITE_IOERR_SHORT_READ }
                }
                Err(error) => {
                    match &error {
                        PageError::TooOld(bound) => self.progress.lock().too_old = Some(*bound),
                        PageError::Io(error) => {
                            let damaged = PageDamage::of(error).cloned();
                            let mut progress = self.progress.lock();
                            progress.damaged = progress.damaged.take().or(damaged);
                        }
                    }
                    read_failed(&error)
                }
            }
        })
    }

    fn set_lock(&mut self, level: c_int) {
        if level > 0 && self.pin.is_none() {
            let pin = self.store.pin();
            *self.progress.lock() = ReadProgress { pinned: Some(pin.version()), ..ReadProgress::default() };
            self.pin = Some(pin);
        }
        if level == 0 {
            self.fetched.clear();
            self.pin = None;
            self.progress.lock().pinned = None;
        }
        self.lock = level;
    }
}

fn read_failed(error: &PageError) -> c_int {
    tracing::warn!(%error, "a page could not be read");
    SQLITE_IOERR_READ
}

fn refused(refused: Refused) -> c_int {
    match refused {
        Refused::Full => SQLITE_FULL,
        Refused::Io => SQLITE_IOERR_WRITE,
    }
}

unsafe extern "C" fn x_close(file: *mut sqlite3_file) -> c_int {
    // SAFETY: SQLite closes a file once, after its last use; the state came from Box::into_raw in x_open.
    let state = unsafe { Box::from_raw((*file.cast::<File>()).state) };
    let closed = catch_unwind(AssertUnwindSafe(|| match state.kind {
        Kind::Reader(mut reader) => reader.set_lock(0),
        Kind::WriterMain(capture) => capture.close_connection(),
        Kind::WriterWal(_) => {}
    }));
    if closed.is_ok() { SQLITE_OK } else { SQLITE_IOERR_CLOSE }
}

unsafe extern "C" fn x_read(file: *mut sqlite3_file, buffer: *mut c_void, amount: c_int, offset: i64) -> c_int {
    // SAFETY: SQLite gives a buffer of `amount` bytes that it uses for nothing else meanwhile.
    let buffer = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), amount as usize) };
    let offset = offset as usize;
    // SAFETY: SQLite calls methods on open files only.
    unsafe {
        with(file, SQLITE_IOERR_READ, |state| match &state.kind {
            Kind::Reader(reader) => reader.read(buffer, offset),
            Kind::WriterMain(capture) => {
                let store = capture.store();
                let (number, within) = page_at(offset, store.page_size().bytes());
                if within + buffer.len() > store.page_size().bytes() {
                    return SQLITE_IOERR_READ;
                }
                match store.copy_at(number, Version(u64::MAX), within, buffer) {
                    Ok(true) => SQLITE_OK,
                    Ok(false) => SQLITE_IOERR_SHORT_READ,
                    Err(error) => {
                        capture.note_failure(&error);
                        read_failed(&error.into())
                    }
                }
            }
            Kind::WriterWal(capture) => match capture.read_wal(buffer, offset) {
                Ok(true) => SQLITE_OK,
                Ok(false) => SQLITE_IOERR_SHORT_READ,
                Err(_) => SQLITE_IOERR_READ,
            },
        })
    }
}

unsafe extern "C" fn x_write(file: *mut sqlite3_file, bytes: *const c_void, amount: c_int, offset: i64) -> c_int {
    // SAFETY: SQLite gives `amount` readable bytes.
    let bytes = unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), amount as usize) };
    // SAFETY: SQLite calls methods on open files only.
    unsafe {
        with(file, SQLITE_IOERR_WRITE, |state| match &state.kind {
            Kind::Reader(_) => SQLITE_READONLY,
            // Only a checkpoint of SQLite's own writes here; the store has the image already.
            Kind::WriterMain(_) => SQLITE_OK,
            Kind::WriterWal(capture) => match capture.write_wal(bytes, offset as usize) {
                Ok(()) => SQLITE_OK,
                Err(why) => refused(why),
            },
        })
    }
}

unsafe extern "C" fn x_truncate(file: *mut sqlite3_file, size: i64) -> c_int {
    // SAFETY: SQLite calls methods on open files only.
    unsafe {
        with(file, SQLITE_IOERR_TRUNCATE, |state| {
            if let Kind::WriterWal(capture) = &state.kind
                && size == 0
            {
                capture.truncate_wal();
            }
            SQLITE_OK
        })
    }
}

unsafe extern "C" fn x_sync(_file: *mut sqlite3_file, _flags: c_int) -> c_int {
    // Durability is the Raft log's.
    SQLITE_OK
}

unsafe extern "C" fn x_file_size(file: *mut sqlite3_file, size: *mut i64) -> c_int {
    // SAFETY: SQLite calls methods on open files only, and `size` is writable.
    unsafe {
        with(file, SQLITE_IOERR_FSTAT, |state| {
            let bytes = match &state.kind {
                Kind::Reader(reader) => {
                    let page_bytes = reader.store.page_size().bytes() as u64;
                    reader.with_pin(|pin| pin.page_count()).map(|count| u64::from(count) * page_bytes)
                }
                Kind::WriterMain(capture) => {
                    let store = capture.store();
                    let count = store.page_count_at(Version(u64::MAX)).map_err(PageError::from);
                    count.map(|count| u64::from(count) * store.page_size().bytes() as u64)
                }
                Kind::WriterWal(capture) => Ok(capture.wal_size() as u64),
            };
            match bytes {
                Ok(bytes) => {
                    *size = bytes as i64;
                    SQLITE_OK
                }
                Err(error) => read_failed(&error),
            }
        })
    }
}

unsafe extern "C" fn x_lock(file: *mut sqlite3_file, level: c_int) -> c_int {
    // SAFETY: SQLite calls methods on open files only.
    unsafe {
        with(file, SQLITE_IOERR_LOCK, |state| {
            if let Kind::Reader(reader) = &mut state.kind {
                if level > SQLITE_LOCK_SHARED {
                    return SQLITE_READONLY;
                }
                if level > reader.lock {
                    reader.set_lock(level);
                }
            }
            SQLITE_OK
        })
    }
}

unsafe extern "C" fn x_unlock(file: *mut sqlite3_file, level: c_int) -> c_int {
    // SAFETY: SQLite calls methods on open files only.
    unsafe {
        with(file, SQLITE_IOERR_UNLOCK, |state| {
            if let Kind::Reader(reader) = &mut state.kind
                && level < reader.lock
            {
                reader.set_lock(level);
            }
            SQLITE_OK
        })
    }
}

unsafe extern "C" fn x_check_reserved_lock(_file: *mut sqlite3_file, held: *mut c_int) -> c_int {
    // SAFETY: SQLite gives a writable int.
    unsafe { *held = 0 };
    SQLITE_OK
}

unsafe extern "C" fn x_file_control(file: *mut sqlite3_file, operation: c_int, argument: *mut c_void) -> c_int {
    // SAFETY: SQLite calls methods on open files only; what `argument` points to is fixed by `operation`.
    unsafe {
        with(file, SQLITE_IOERR, |state| match operation {
            FILE_CONTROL_SEAL => {
                state.sealed = true;
                SQLITE_OK
            }
            SQLITE_FCNTL_PRAGMA if state.sealed => {
                // [0]: where an error text goes, [1]: the name, [2]: the argument or null.
                let words = argument.cast::<*mut c_char>();
                let name = CStr::from_ptr(*words.add(1)).to_string_lossy();
                match refuse::pragma(&name, !(*words.add(2)).is_null()) {
                    Some(why) => {
                        let text = CString::new(why).unwrap_or_default();
                        *words = sqlite3_mprintf(c"%s".as_ptr(), text.as_ptr());
                        SQLITE_ERROR
                    }
                    None => SQLITE_NOTFOUND,
                }
            }
            SQLITE_FCNTL_PERSIST_WAL => {
                *argument.cast::<c_int>() = 1;
                SQLITE_OK
            }
            _ => SQLITE_NOTFOUND,
        })
    }
}

unsafe extern "C" fn x_sector_size(_file: *mut sqlite3_file) -> c_int {
    4096
}

unsafe extern "C" fn x_device_characteristics(_file: *mut sqlite3_file) -> c_int {
    SQLITE_IOCAP_ATOMIC | SQLITE_IOCAP_SAFE_APPEND | SQLITE_IOCAP_SEQUENTIAL | SQLITE_IOCAP_POWERSAFE_OVERWRITE
}

unsafe extern "C" fn x_shm_map(
    file: *mut sqlite3_file,
    region: c_int,
    size: c_int,
    extend: c_int,
    address: *mut *mut c_void,
) -> c_int {
    // SAFETY: SQLite calls methods on open files only, and `address` is writable.
    unsafe {
        with(file, SQLITE_IOERR_SHMMAP, |state| match &state.kind {
            Kind::WriterMain(capture) if size == 32768 => {
                // The capture holds the region until the connection is closed.
                *address = capture
                    .index_region(region as usize, extend != 0)
                    .map_or(null_mut(), |region| Arc::as_ptr(&region).cast_mut().cast());
                SQLITE_OK
            }
            _ => SQLITE_IOERR_SHMMAP,
        })
    }
}

unsafe extern "C" fn x_shm_lock(file: *mut sqlite3_file, first: c_int, _count: c_int, flags: c_int) -> c_int {
    // The wal-index is private: every lock is granted, but for the write lock while nobody may write.
    let write_lock = first == 0 && flags & SQLITE_SHM_EXCLUSIVE != 0;
    let released = flags & SQLITE_SHM_UNLOCK != 0;
    // SAFETY: SQLite calls methods on open files only.
    unsafe {
        with(file, SQLITE_IOERR_SHMLOCK, |state| {
            if let Kind::WriterMain(capture) = &state.kind
                && write_lock
            {
                if released {
                    capture.write_lock_released();
                } else if capture.is_read_only() {
                    return SQLITE_READONLY;
                }
            }
            SQLITE_OK
        })
    }
}

unsafe extern "C" fn x_shm_barrier(_file: *mut sqlite3_file) {
    fence(Ordering::SeqCst);
}

unsafe extern "C" fn x_shm_unmap(_file: *mut sqlite3_file, _delete: c_int) -> c_int {
    SQLITE_OK
}

unsafe extern "C" fn x_fetch(file: *mut sqlite3_file, offset: i64, amount: c_int, address: *mut *mut c_void) -> c_int {
    // SAFETY: SQLite calls methods on open files only, and `address` is writable.
    unsafe {
        *address = null_mut();
        with(file, SQLITE_IOERR_READ, |state| {
            let Kind::Reader(reader) = &mut state.kind else {
                return SQLITE_OK;
            };
            let Some(pin) = &reader.pin else {
                return SQLITE_OK;
            };
            let page_bytes = reader.store.page_size().bytes();
            let (number, within) = page_at(offset as usize, page_bytes);
            // Page 1 is patched on the way, so it has to be copied.
            let whole = within == 0 && amount as usize <= page_bytes && number.0 > 1;
            let in_database = pin.page_count().is_ok_and(|count| number.0 <= count);
            if whole
                && in_database
                && let Some(page) = pin.cached(number)
            {
                let entry = reader.fetched.entry(number.0).or_insert_with(|| (page, 0));
                entry.1 += 1;
                // Read only: SQLite never writes through it, the connection being read-only.
                *address = entry.0.bytes().as_ptr().cast_mut().cast();
            }
            SQLITE_OK
        })
    }
}

unsafe extern "C" fn x_unfetch(file: *mut sqlite3_file, offset: i64, address: *mut c_void) -> c_int {
    // SAFETY: SQLite calls methods on open files only.
    unsafe {
        with(file, SQLITE_IOERR, |state| {
            let Kind::Reader(reader) = &mut state.kind else {
                return SQLITE_OK;
            };
            if address.is_null() {
                return SQLITE_OK;
            }
            let (number, _) = page_at(offset as usize, reader.store.page_size().bytes());
            if let Some(entry) = reader.fetched.get_mut(&number.0) {
                entry.1 -= 1;
                if entry.1 == 0 {
                    reader.fetched.remove(&number.0);
                }
            }
            SQLITE_OK
        })
    }
}

static METHODS: sqlite3_io_methods = sqlite3_io_methods {
    iVersion: 3,
    xClose: Some(x_close),
    xRead: Some(x_read),
    xWrite: Some(x_write),
    xTruncate: Some(x_truncate),
    xSync: Some(x_sync),
    xFileSize: Some(x_file_size),
    xLock: Some(x_lock),
    xUnlock: Some(x_unlock),
    xCheckReservedLock: Some(x_check_reserved_lock),
    xFileControl: Some(x_file_control),
    xSectorSize: Some(x_sector_size),
    xDeviceCharacteristics: Some(x_device_characteristics),
    xShmMap: Some(x_shm_map),
    xShmLock: Some(x_shm_lock),
    xShmBarrier: Some(x_shm_barrier),
    xShmUnmap: Some(x_shm_unmap),
    xFetch: Some(x_fetch),
    xUnfetch: Some(x_unfetch),
};

unsafe extern "C" fn x_open(
    _vfs: *mut sqlite3_vfs,
    name: sqlite3_filename,
    file: *mut sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite gives szOsFile writable bytes; no method may be called unless the pointer is set.
    unsafe { (*file).pMethods = null() };
    if flags & (SQLITE_OPEN_MAIN_DB | SQLITE_OPEN_WAL) == 0 {
        if flags & SQLITE_OPEN_MAIN_JOURNAL != 0 {
            return SQLITE_CANTOPEN;
        }
        // Temporary databases, statement journals, sorters.
        let system = *SYSTEM_VFS as *mut sqlite3_vfs;
        // SAFETY: the system VFS lives for ever, and szOsFile is at least its own.
        return unsafe {
            match (*system).xOpen {
                Some(open) => open(system, name, file, flags, out_flags),
                None => SQLITE_CANTOPEN,
            }
        };
    }
    let opened = catch_unwind(AssertUnwindSafe(|| {
        if name.is_null() {
            return None;
        }
        // SAFETY: SQLite's file names are zero-terminated.
        let name = unsafe { CStr::from_ptr(name) }.to_str().ok()?;
        let wal = flags & SQLITE_OPEN_WAL != 0;
        let view = if wal { name.strip_suffix("-wal")? } else { name };
        let mut names = NAMES.lock();
        let name = names.get_mut(view)?;
        if !wal && std::mem::replace(&mut name.opened, true) {
            return None;
        }
        let kind = match (&name.view, wal) {
            (View::Writer(capture), false) => Kind::WriterMain(capture.clone()),
            (View::Writer(capture), true) => Kind::WriterWal(capture.clone()),
            (View::Reader { store, progress }, false) => Kind::Reader(ReaderFile {
                store: store.clone(),
                pin: None,
                progress: progress.clone(),
                lock: 0,
                fetched: PageMap::default(),
            }),
            (View::Reader { .. }, true) => return None,
        };
        Some(Box::new(FileState { kind, sealed: false }))
    }));
    match opened {
        Ok(Some(state)) => {
            // SAFETY: szOsFile is at least the size of File; the memory is SQLite's and not yet in use.
            unsafe {
                let file = file.cast::<File>();
                (&raw mut (*file).state).write(Box::into_raw(state));
                (*file).base.pMethods = &METHODS;
                if !out_flags.is_null() {
                    *out_flags = flags;
                }
            }
            SQLITE_OK
        }
        _ => SQLITE_CANTOPEN,
    }
}

unsafe extern "C" fn x_delete(_vfs: *mut sqlite3_vfs, _name: *const c_char, _sync: c_int) -> c_int {
    // Nothing of ours is a file.
    SQLITE_OK
}

unsafe extern "C" fn x_access(_vfs: *mut sqlite3_vfs, _name: *const c_char, _flags: c_int, out: *mut c_int) -> c_int {
    // SAFETY: SQLite gives a writable int.
    unsafe { *out = 0 };
    SQLITE_OK
}

unsafe extern "C" fn x_full_pathname(
    _vfs: *mut sqlite3_vfs,
    name: *const c_char,
    size: c_int,
    out: *mut c_char,
) -> c_int {
    // SAFETY: the name is zero-terminated, and `out` has `size` bytes.
    unsafe {
        let bytes = CStr::from_ptr(name).to_bytes_with_nul();
        if bytes.len() > size as usize {
            return SQLITE_CANTOPEN;
        }
        std::ptr::copy_nonoverlapping(bytes.as_ptr().cast::<c_char>(), out, bytes.len());
    }
    SQLITE_OK
}

/// The address of SQLite's own VFS.
static SYSTEM_VFS: LazyLock<usize> = LazyLock::new(|| {
    // SAFETY: looking up a VFS by name has no preconditions once SQLite is initialised, which it does by itself.
    unsafe { sqlite3_vfs_find(c"unix".as_ptr()) as usize }
});

fn register_vfs() -> c_int {
    let system = *SYSTEM_VFS as *mut sqlite3_vfs;
    if system.is_null() {
        return SQLITE_ERROR;
    }
    // SAFETY: the system VFS is a valid, immutable table; the copy keeps its clock, sleep and randomness functions. Ours is leaked, as
    // a registered VFS must live for ever.
    unsafe {
        let mut vfs: sqlite3_vfs = std::ptr::read(system);
        vfs.szOsFile = vfs.szOsFile.max(std::mem::size_of::<File>() as c_int);
        vfs.zName = CString::new(VFS_NAME).unwrap_or_default().into_raw();
        vfs.pNext = null_mut();
        vfs.xOpen = Some(x_open);
        vfs.xDelete = Some(x_delete);
        vfs.xAccess = Some(x_access);
        vfs.xFullPathname = Some(x_full_pathname);
        sqlite3_vfs_register(Box::into_raw(Box::new(vfs)), 0)
    }
}
