//! A disk that fails: errors for writers, service for readers, and no disagreement afterwards.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use redb::StorageBackend;
use redb::backends::FileBackend;

use super::*;

/// What the disk does now.
#[derive(Default)]
struct Weather {
    is_full: AtomicBool,
    /// Syncs that still succeed before the disk is full; `u32::MAX`: no limit.
    syncs_left: AtomicU32,
}

impl Weather {
    fn check(&self) -> io::Result<()> {
        if self.is_full.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc_enospc()));
        }
        Ok(())
    }
}

/// ENOSPC on Linux.
const fn libc_enospc() -> i32 {
    28
}

/// A file on a disk that can become full.
struct WeatheredFile {
    file: FileBackend,
    weather: Arc<Weather>,
}

impl fmt::Debug for WeatheredFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WeatheredFile")
    }
}

impl StorageBackend for WeatheredFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.weather.check()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.weather.check()?;
        let left = self.weather.syncs_left.load(Ordering::SeqCst);
        if left == 0 {
            self.weather.is_full.store(true, Ordering::SeqCst);
            return self.weather.check();
        }
        if left != u32::MAX {
            self.weather.syncs_left.store(left - 1, Ordering::SeqCst);
        }
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.weather.check()?;
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}

fn open_weathered(path: PathBuf, weather: &Arc<Weather>) -> Store {
    let weather = Arc::clone(weather);
    Store::open_with(Box::new(move || {
        let failed = |reason: String| OpenError::Io {
            path: path.display().to_string(),
            reason,
        };
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| failed(e.to_string()))?;
        let file = FileBackend::new(file).map_err(|e| failed(e.to_string()))?;
        let weather = Arc::clone(&weather);
        let database = redb::Builder::new()
            .create_with_backend(WeatheredFile { file, weather })
            .map_err(|e| failed(e.to_string()))?;
        log::RedbLog::load(database, &path, None)
    }))
    .unwrap()
}

#[tokio::test]
async fn a_full_disk_refuses_writes_and_serves_reads_until_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let weather = Arc::new(Weather::default());
    weather.syncs_left.store(u32::MAX, Ordering::SeqCst);
    let store = open_weathered(dir.path().join("store.redb"), &weather);
    for n in 0..20 {
        store
            .commit(Txn::new().put(key(n), "before"))
            .await
            .unwrap();
    }
    let mut watch = store.watch("/", 20).unwrap();
    weather.is_full.store(true, Ordering::SeqCst);
    for n in 0..3 {
        let error = store
            .commit(Txn::new().put(key(n), "lost"))
            .await
            .unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
        assert!(error.to_string().contains("reads go on"), "{error}");
    }
    assert_eq!(store.revision(), 20);
    assert_eq!(store.list("/").1.len(), 20);
    assert_eq!(store.get(&key(0)).unwrap().value, "before");
    assert_eq!(watch.try_next(), Ok(None));

    weather.is_full.store(false, Ordering::SeqCst);
    let written = written_again(&store).await;
    store.close().await;
    let reopened = open(dir.path());
    assert_eq!(reopened.revision(), written);
    assert_eq!(reopened.get("/again").unwrap().mod_revision, written);
}

/// Waits until the store takes writes again.
async fn written_again(store: &Store) -> Revision {
    for _ in 0..100 {
        if let Ok(revision) = store.commit(Txn::new().put("/again", "x")).await {
            return revision;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the store never recovered");
}

/// The disk fails at every possible sync in turn. Whatever became of the write in doubt, memory and
/// disk agree afterwards, and nothing acknowledged is lost.
#[tokio::test]
async fn a_write_in_doubt_is_either_seen_by_all_or_by_none() {
    for syncs in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let weather = Arc::new(Weather::default());
        weather.syncs_left.store(u32::MAX, Ordering::SeqCst);
        let store = open_weathered(dir.path().join("store.redb"), &weather);
        let mut watch = store.watch("/", 0).unwrap();
        weather.syncs_left.store(syncs, Ordering::SeqCst);
        let mut acked = 0;
        for n in 0..20 {
            match store.commit(Txn::new().put(key(n), "x")).await {
                Ok(revision) => acked = revision,
                Err(_) => break,
            }
        }
        weather.syncs_left.store(u32::MAX, Ordering::SeqCst);
        weather.is_full.store(false, Ordering::SeqCst);
        let written = written_again(&store).await;
        assert!(written > acked);
        let (revision, live) = store.list("/");
        store.close().await;
        let reopened = open(dir.path());
        assert_eq!(reopened.list("/"), (revision, live), "after {syncs} syncs");
        // Watchers saw every revision once, the one in doubt included or not.
        for expected in 1..=written {
            assert_eq!(watch.try_next().unwrap().unwrap().revision(), expected);
        }
    }
}

/// A bit of the file has changed while nobody looked. It is found, or it is in what is not read; the process
/// goes on, so that the words and a restore are possible.
#[tokio::test]
async fn a_damaged_file_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let store = open(dir.path());
    for n in 0..20 {
        store.commit(Txn::new().put(key(n), "x")).await.unwrap();
    }
    store.close().await;
    let whole = std::fs::read(&path).unwrap();
    let mut refused = 0;
    for place in (0..whole.len()).step_by(4_096) {
        let mut damaged = whole.clone();
        damaged[place] ^= 0x80;
        std::fs::write(&path, damaged).unwrap();
        match Store::open(&path) {
            Ok(store) => store.close().await,
            Err(OpenError::Corrupt { .. } | OpenError::Io { .. }) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(refused > 0);
}
