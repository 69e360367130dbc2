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
fn a_filter_is_written_once_per_profile() {
    let directory = tempfile::tempdir().unwrap();
    let paths = Paths {
        run: directory.path().join("run"),
        lib: directory.path().join("lib"),
        ..Paths::standard("/nowhere".into())
    };
    let oci = Spec::default();
    let ensure = |profile: Seccomp| super::ensure(&profile, &oci, &paths);
    let path = ensure(Seccomp::RuntimeDefault).unwrap().unwrap();
    let written = fs::metadata(&path).unwrap().modified().unwrap();
    assert_eq!(ensure(Seccomp::RuntimeDefault).unwrap().unwrap(), path);
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
    assert!(ensure(Seccomp::Unconfined).unwrap().is_none());

    let local = |name: &str| ensure(Seccomp::Localhost(name.into()));
    let words = |name: &str| local(name).unwrap_err().to_string();
    let missing = words("p.json");
    assert!(
        missing.contains("p.json") && missing.contains("put the profile there"),
        "{missing}"
    );
    let profiles = paths.lib.join("seccomp");
    fs::create_dir_all(&profiles).unwrap();
    fs::write(
        directory.path().join("lib/out.json"),
        r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#,
    )
    .unwrap();
    std::os::unix::fs::symlink("../out.json", profiles.join("link.json")).unwrap();
    for escape in ["../out.json", "/etc/passwd", "link.json", ""] {
        assert!(local(escape).is_err(), "{escape}");
    }
    fs::write(
        profiles.join("p.json"),
        r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#,
    )
    .unwrap();
    let first = local("p.json").unwrap().unwrap();
    assert_eq!(local("p.json").unwrap().unwrap(), first);
    fs::write(
        profiles.join("p.json"),
        r#"{"defaultAction":"SCMP_ACT_LOG"}"#,
    )
    .unwrap();
    assert_ne!(local("p.json").unwrap().unwrap(), first);
}

fn profile(rules: serde_json::Value, default: &str) -> Vec<u8> {
    let document = serde_json::json!({
        "defaultAction": default,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"],
        "syscalls": rules,
    });
    profile::compile(&document.to_string()).unwrap()
}

#[test]
fn an_allow_list_of_the_node_holds_with_several_actions() {
    let socket_arguments = serde_json::json!([
        {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
        {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"},
    ]);
    let bytes = profile(
        serde_json::json!([
            {"names": ["read", "write", "socketcall"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": socket_arguments},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 0x7e02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
        ]),
        "SCMP_ACT_ERRNO",
    );
    let check = |call, arg0| verdict(&bytes, call, arg0);
    assert_eq!(check(libc::SYS_read, 0), 0);
    assert_eq!(check(libc::SYS_openat, 0), EPERM);
    assert_eq!(check(libc::SYS_clone3, 0), 38);
    assert_eq!(
        (check(libc::SYS_socket, 1), check(libc::SYS_socket, 2)),
        (0, 0)
    );
    assert_eq!(check(libc::SYS_socket, 3), EPERM);
    assert_eq!(check(libc::SYS_clone, 17), 0);
    assert_eq!(check(libc::SYS_clone, libc::CLONE_NEWNS as u64), EPERM);
}

#[test]
fn a_deny_list_of_the_node_has_no_way_around() {
    let bytes = profile(
        serde_json::json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]),
        "SCMP_ACT_ALLOW",
    );
    assert_eq!(verdict(&bytes, libc::SYS_read, 0), 0);
    assert_eq!(verdict(&bytes, libc::SYS_mkdirat, 0), EPERM);
    if cfg!(target_arch = "x86_64") {
        let by_x32 = verdict(&bytes, libc::SYS_mkdirat | 0x4000_0000, 0);
        assert_eq!(by_x32, libc::ENOSYS as u32);
    }
}

#[test]
fn what_a_profile_cannot_have_is_refused_in_words() {
    let rule = |text: &str| format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{text}]}}"#);
    for (text, word) in [
        ("nonsense".to_owned(), "OCI format"),
        (
            r#"{"defaultAction":"SCMP_ACT_BEST"}"#.to_owned(),
            "SCMP_ACT_BEST",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#.to_owned(),
            "listener",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"]}"#.to_owned(),
            "32-bit",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_LOG"]}"#.to_owned(),
            "FLAG_LOG",
        ),
        (
            rule(r#"{"names":["raed"],"action":"SCMP_ACT_ERRNO"}"#),
            "raed",
        ),
        (
            rule(
                r#"{"names":["read"],"action":"SCMP_ACT_ERRNO","excludes":{"caps":["CAP_SYS_ADMIN"]}}"#,
            ),
            "Docker",
        ),
        (
            rule(
                r#"{"names":["read"],"action":"SCMP_ACT_ERRNO","args":[{"index":9,"value":1,"op":"SCMP_CMP_EQ"}]}"#,
            ),
            "argument 9",
        ),
        (
            rule(
                r#"{"names":["read"],"action":"SCMP_ACT_ERRNO","args":[{"index":0,"value":1,"op":"SCMP_CMP_IS"}]}"#,
            ),
            "SCMP_CMP_IS",
        ),
    ] {
        let error = profile::compile(&text).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
}

proptest::proptest! {
    #[test]
    fn any_text_compiles_or_is_refused(text in "\\PC{0,200}") {
        let _ = profile::compile(&text);
    }

    /// Whatever the order of rules over distinct calls, each call gets its own action.
    #[test]
    fn each_call_gets_its_action(actions in proptest::collection::vec(0u8..4, 1..40), default in 0u8..2) {
        let name = |a: u8| match a {
            0 => serde_json::json!({"action": "SCMP_ACT_ALLOW"}),
            n => serde_json::json!({"action": "SCMP_ACT_ERRNO", "errnoRet": n}),
        };
        let calls: Vec<syscalls::Sysno> = syscalls::Sysno::iter().take(actions.len()).collect();
        let rules: Vec<serde_json::Value> = calls.iter().zip(&actions).map(|(call, a)| {
            let mut rule = name(*a);
            rule["names"] = serde_json::json!([call.name()]);
            rule
        }).collect();
        let default_action = if default == 0 { "SCMP_ACT_ALLOW" } else { "SCMP_ACT_ERRNO" };
        let bytes = profile(rules.into(), default_action);
        for (call, a) in calls.iter().zip(&actions) {
            proptest::prop_assert_eq!(verdict(&bytes, i64::from(call.id()), 0), u32::from(*a));
        }
        proptest::prop_assert_eq!(verdict(&bytes, 400, 0), u32::from(default));
    }
}
