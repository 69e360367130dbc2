//! How many entries the pinned eBPF maps have.
//!
//! Asked by bpf(2) itself and not by the agent's own code, which is what is tested. Arrays are left
//! out: all their elements always exist. `REVERSE_NAT` and `AFFINITY` forget by age, not by pods.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};

const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_GET: libc::c_long = 7;
/// Kinds of maps whose entries are counted (`/proc/self/fdinfo`, `map_type`): `BPF_MAP_TYPE_HASH`.
const HASH: u32 = 1;
/// More than any map of ours has: an end for a map that changes while it is read.
const ENTRY_COUNT_MAX: usize = 1 << 17;

/// `union bpf_attr` of `BPF_OBJ_GET`.
#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// `union bpf_attr` of `BPF_MAP_GET_NEXT_KEY`.
#[repr(C)]
struct KeyAttr {
    map_fd: u32,
    padding: u32,
    key: u64,
    next_key: u64,
}

/// The hash maps pinned anywhere below: name and number of entries.
pub(super) fn entries(directory: &Path) -> Result<Vec<(String, usize)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            found.extend(entries(&path)?);
            continue;
        }
        let Ok(pin) = open(&path) else {
            continue; // removed meanwhile
        };
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pin.as_raw_fd()))?;
        if number(&info, "map_type:") != Some(HASH) {
            continue;
        }
        let size = number(&info, "key_size:").context("a map without key_size")?;
        let name = entry.file_name().display().to_string();
        found.push((name, count(&pin, size as usize)));
    }
    Ok(found)
}

fn number(info: &str, name: &str) -> Option<u32> {
    let line = info.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().parse().ok()
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let attr = ObjectAttr {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads `attr` for the size given and the NUL-terminated path, both alive
    // until it returns; on success the descriptor is new and ours.
    unsafe {
        let fd = libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &attr, size_of::<ObjectAttr>());
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

fn count(map: &OwnedFd, key_size: usize) -> usize {
    let mut key: Option<Vec<u8>> = None;
    for number in 0..ENTRY_COUNT_MAX {
        let mut next = vec![0u8; key_size];
        let attr = KeyAttr {
            map_fd: map.as_raw_fd() as u32,
            padding: 0,
            key: key.as_ref().map_or(0, |k| k.as_ptr() as u64),
            next_key: next.as_mut_ptr() as u64,
        };
        // SAFETY: the kernel reads one key (or none) and writes one, each of the map's own
        // `key_size`, which is the length of both buffers; they outlive the call.
        let done = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_GET_NEXT_KEY,
                &attr,
                size_of::<KeyAttr>(),
            )
        };
        if done < 0 {
            return number;
        }
        key = Some(next);
    }
    ENTRY_COUNT_MAX
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_of_fdinfo_are_read_by_name() {
        let info = "pos:\t0\nmap_type:\t1\nkey_size:\t20\n";
        assert_eq!(super::number(info, "map_type:"), Some(1));
        assert_eq!(super::number(info, "key_size:"), Some(20));
        assert_eq!(super::number(info, "memlock:"), None);
    }
}
