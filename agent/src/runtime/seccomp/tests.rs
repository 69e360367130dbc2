//! The compiled filters, run by a small interpreter of the BPF subset that seccomp uses.

use super::*;
use std::collections::HashSet;

/// What the kernel gives a filter.
fn data(call: i64, arg0: u64) -> [u8; 64] {
    let mut data = [0; 64];
    data[..4].copy_from_slice(&(call as u32).to_le_bytes());
    let arch: u32 = if cfg!(target_arch = "x86_64") {
        0xc000_003e
    } else {
        0xc000_00b7
    };
    data[4..8].copy_from_slice(&arch.to_le_bytes());
    data[16..24].copy_from_slice(&arg0.to_le_bytes());
    data
}

/// Runs one program; classic BPF as in `net/core/filter.c`.
fn run(program: &[[u8; 8]], data: &[u8; 64]) -> u32 {
    let (mut at, mut a) = (0usize, 0u32);
    loop {
        let i = program[at];
        let code = u16::from_le_bytes([i[0], i[1]]);
        let k = u32::from_le_bytes([i[4], i[5], i[6], i[7]]);
        at += 1;
        let mut jump = |yes: bool| at += usize::from(if yes { i[2] } else { i[3] });
        match code {
            0x20 => a = u32::from_le_bytes(data[k as usize..k as usize + 4].try_into().unwrap()),
            0x54 => a &= k,
            0x15 => jump(a == k),
            0x25 => jump(a > k),
            0x35 => jump(a >= k),
            0x05 => at += k as usize,
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// The errno of a call under all programs of a file, 0 when it passes.
fn verdict(bytes: &[u8], call: i64, arg0: u64) -> u32 {
    let mut rest = bytes;
    let mut errno = 0;
    while !rest.is_empty() {
        let count = u32::from_le_bytes(rest[..4].try_into().unwrap()) as usize;
        let program: Vec<[u8; 8]> = rest[4..4 + count * 8]
            .chunks_exact(8)
            .map(|c| c.try_into().unwrap())
            .collect();
        assert!(count <= 4096);
        match run(&program, &data(call, arg0)) {
            0x7fff_0000 => {}
            action => {
                assert_eq!(action >> 16, 5, "{action:#x} is no errno");
                errno = action & 0xffff;
            }
        }
        rest = &rest[4 + count * 8..];
    }
    errno
}

const EPERM: u32 = libc::EPERM as u32;

#[test]
fn docker_s_rules_hold_for_the_default_capabilities() {
    let bytes = compile(&rules(&[Capability::SysChroot, Capability::Mknod])).unwrap();
    let check = |call, arg0| verdict(&bytes, call, arg0);
    for call in [
        libc::SYS_read,
        libc::SYS_execve,
        libc::SYS_prctl,
        libc::SYS_capset,
        462,
    ] {
        assert_eq!(check(call, 0), 0, "{call}");
    }
    for call in [
        libc::SYS_mount,
        libc::SYS_bpf,
        libc::SYS_unshare,
        libc::SYS_keyctl,
        9999,
    ] {
        assert_eq!(check(call, 0), EPERM, "{call}");
    }
    assert_eq!(check(libc::SYS_chroot, 0), 0);
    assert_eq!(check(libc::SYS_clone3, 0), libc::ENOSYS as u32);
    assert_eq!(check(libc::SYS_clone, libc::SIGCHLD as u64), 0);
    for flag in [libc::CLONE_NEWUSER, libc::CLONE_NEWNS, libc::CLONE_NEWNET] {
        assert_eq!(check(libc::SYS_clone, flag as u32 as u64), EPERM);
    }
    assert_eq!(check(libc::SYS_socket, libc::AF_INET as u64), 0);
    assert_eq!(check(libc::SYS_socket, AF_VSOCK), EPERM);
    assert_eq!(check(libc::SYS_socket, (1 << 32) | AF_VSOCK), EPERM);
    for personality in PERSONALITIES {
        assert_eq!(check(libc::SYS_personality, personality), 0);
    }
    assert_eq!(check(libc::SYS_personality, 0x0040_0000), EPERM);
}

#[test]
fn capabilities_open_what_they_are_for() {
    let bytes = compile(&rules(&[Capability::SysAdmin])).unwrap();
    for call in [libc::SYS_mount, libc::SYS_unshare, libc::SYS_clone3] {
        assert_eq!(verdict(&bytes, call, 0), 0);
    }
    assert_eq!(
        verdict(&bytes, libc::SYS_clone, libc::CLONE_NEWNS as u64),
        0
    );
    assert_eq!(verdict(&bytes, libc::SYS_reboot, 0), EPERM);
}

#[test]
fn only_what_differs_has_another_file() {
    let name = |caps: &[Capability]| digest(&rules(caps));
    assert_eq!(name(&[]), name(&[Capability::Chown]));
    let all: HashSet<String> = table::BY_CAPABILITY
        .iter()
        .map(|(capability, _)| name(&[*capability]))
        .collect();
    assert_eq!(all.len(), table::BY_CAPABILITY.len());
}

#[test]
fn a_filter_is_written_once_and_custom_profiles_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let oci = Spec::default();
    let path = ensure(&Seccomp::RuntimeDefault, &oci, directory.path())
        .unwrap()
        .unwrap();
    let written = fs::metadata(&path).unwrap().modified().unwrap();
    assert_eq!(
        ensure(&Seccomp::RuntimeDefault, &oci, directory.path())
            .unwrap()
            .unwrap(),
        path
    );
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
    assert!(
        ensure(&Seccomp::Unconfined, &oci, directory.path())
            .unwrap()
            .is_none()
    );
    let custom = Seccomp::Localhost("p.json".into());
    let error = ensure(&custom, &oci, directory.path())
        .unwrap_err()
        .to_string();
    assert!(error.contains("p.json"), "{error}");
}
