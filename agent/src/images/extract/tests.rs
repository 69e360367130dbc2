use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use proptest::prelude::*;
use tar::{Builder, Header};

use super::*;

const OPTIONS: ExtractOptions = ExtractOptions {
    entries_max: 1000,
    bytes_max: 1 << 20,
    devices: DevicePolicy::Skip,
};

fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: unpacking layers needs root (owners, whiteouts)");
    }
    root
}

/// One entry, with names that no honest tool writes.
fn add(builder: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, link: &str, data: &[u8]) {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_mtime(1_000_000_000);
    header.set_size(data.len() as u64);
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    builder.append(&header, data).unwrap();
}

type Spec<'a> = (EntryType, &'a str, &'a str, &'a [u8]);

fn archive(entries: &[Spec<'_>]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (kind, name, link, data) in entries {
        add(&mut builder, *kind, name, link, data);
    }
    builder.into_inner().unwrap()
}

/// A directory with `layer` (the root) beside `secret`, which nothing may reach.
struct Arena(tempfile::TempDir);

impl Arena {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("layer")).unwrap();
        fs::write(dir.path().join("secret"), "untouched").unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join("layer").join(name)
    }

    fn unpack(&self, bytes: &[u8]) -> Result<Summary, ExtractError> {
        let result = extract(bytes, &self.path(""), &OPTIONS);
        assert_eq!(
            fs::read_to_string(self.0.path().join("secret")).unwrap(),
            "untouched"
        );
        assert_eq!(
            fs::read_dir(self.0.path()).unwrap().count(),
            2,
            "something escaped"
        );
        result
    }
}

const FILE: EntryType = EntryType::Regular;
const DIR: EntryType = EntryType::Directory;
const SYM: EntryType = EntryType::Symlink;
const HARD: EntryType = EntryType::Link;

#[test]
fn ordinary_layer_keeps_modes_owners_times_and_links() {
    if !root() {
        return;
    }
    let arena = Arena::new();
    let mut builder = Builder::new(Vec::new());
    add(&mut builder, DIR, "./usr/bin/", "", b"");
    let mut header = Header::new_gnu();
    header.set_path("usr/bin/su").unwrap();
    header.set_mode(0o4755);
    header.set_uid(7);
    header.set_gid(8);
    header.set_mtime(1_234_567_890);
    header.set_size(2);
    header.set_cksum();
    builder
        .append_pax_extensions([
            ("SCHILY.xattr.user.note", b"hi".as_slice()),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y".as_slice()),
        ])
        .unwrap();
    builder.append(&header, b"su".as_slice()).unwrap();
    add(&mut builder, HARD, "usr/bin/su2", "usr/bin/su", b"");
    add(&mut builder, SYM, "bin", "usr/bin", b"");
    add(&mut builder, EntryType::Fifo, "pipe", "", b"");
    let summary = arena.unpack(&builder.into_inner().unwrap()).unwrap();
    assert_eq!((summary.entries, summary.bytes), (5, 2));
    let su = fs::metadata(arena.path("bin/su")).unwrap();
    assert_eq!(
        (su.mode() & 0o7777, su.uid(), su.gid(), su.mtime()),
        (0o4755, 7, 8, 1_234_567_890)
    );
    assert_eq!(su.nlink(), 2);
    assert_eq!(
        fs::metadata(arena.path("usr/bin")).unwrap().mtime(),
        1_000_000_000
    );
    assert!(
        fs::metadata(arena.path("pipe"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    let mut names = vec![0; 256];
    let count = rustix::fs::listxattr(arena.path("usr/bin/su"), &mut names[..]).unwrap();
    let names = String::from_utf8_lossy(&names[..count]).into_owned();
    assert!(!names.contains("trusted"), "{names}");
    let flags = rustix::fs::XattrFlags::empty();
    if rustix::fs::setxattr(arena.path("usr"), "user.probe", b"x", flags).is_ok() {
        assert!(names.contains("user.note"), "{names}");
    } else {
        eprintln!("skipped: no user attributes on this file system (tmpfs before Linux 6.6)");
    }
}

#[test]
fn hostile_entries_are_refused_or_stay_inside() {
    if !root() {
        return;
    }
    let refused: &[&[Spec<'_>]] = &[
        &[(FILE, "../secret", "", b"x")],
        &[(FILE, "a/../../secret", "", b"x")],
        &[(HARD, "a", "../secret", b"")],
        &[(HARD, "a", "/etc/passwd", b"")],
        &[(SYM, "l", "..", b""), (HARD, "a", "l/secret", b"")],
        &[(HARD, "a", "a", b"")],
        &[(DIR, "d", "", b""), (HARD, "a", "d", b"")],
        &[(FILE, ".wh...", "", b"")],
        &[(FILE, ".wh..", "", b"")],
        &[(FILE, ".wh.", "", b"")],
        &[(FILE, "f", "", b"x"), (FILE, "f/g", "", b"x")],
        &[(SYM, "l", "l", b""), (FILE, "l/x", "", b"x")],
        &[(SYM, "l", "missing", b""), (FILE, "l/x", "", b"x")],
        &[(SYM, "l", "", b"")],
        &[(EntryType::new(b'Z'), "odd", "", b"")],
    ];
    for entries in refused {
        let arena = Arena::new();
        let error = arena.unpack(&archive(entries)).unwrap_err();
        assert!(
            matches!(error, ExtractError::Refused { .. }),
            "{entries:?}: {error}"
        );
    }
    // These are legal; they must land inside.
    let arena = Arena::new();
    let entries: &[Spec<'_>] = &[
        (FILE, "/abs", "", b"in"),
        (SYM, "up", "../../..", b""),
        (FILE, "up/secret", "", b"in"),
        (SYM, "root", "/", b""),
        (FILE, "root/rooted", "", b"in"),
        (SYM, "file", "../secret", b""),
        (FILE, "file", "", b"replaced, not written through"),
        (SYM, "h", "/etc/passwd", b""),
        (HARD, "hh", "h", b""),
    ];
    arena.unpack(&archive(entries)).unwrap();
    for (name, content) in [("abs", "in"), ("secret", "in"), ("rooted", "in")] {
        assert_eq!(fs::read_to_string(arena.path(name)).unwrap(), content);
    }
    assert!(fs::symlink_metadata(arena.path("file")).unwrap().is_file());
    assert!(fs::symlink_metadata(arena.path("hh")).unwrap().is_symlink());
}

#[test]
fn devices_are_left_out_or_refused_as_told() {
    if !root() {
        return;
    }
    let bytes = archive(&[
        (EntryType::Char, "dev/null", "", b""),
        (EntryType::Block, "b", "", b""),
    ]);
    let arena = Arena::new();
    assert_eq!(arena.unpack(&bytes).unwrap().skipped, ["dev/null", "b"]);
    assert!(!arena.path("b").exists() && !arena.path("dev/null").exists());
    let strict = ExtractOptions {
        devices: DevicePolicy::Refuse,
        ..OPTIONS
    };
    assert!(extract(&bytes[..], &arena.path(""), &strict).is_err());
}

fn is_whiteout(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == 0)
}

fn is_opaque(path: &Path) -> bool {
    let mut value = [0; 8];
    rustix::fs::getxattr(path, "trusted.overlay.opaque", &mut value[..]).is_ok_and(|n| n == 1)
}

#[test]
fn whiteouts_become_overlay_whiteouts_in_any_order() {
    if !root() {
        return;
    }
    let arena = Arena::new();
    arena
        .unpack(&archive(&[
            (FILE, "etc/.wh.gone", "", b""),
            (FILE, "opaque/.wh..wh..opq", "", b""),
            (FILE, ".wh..wh.plnk", "", b""),
            (FILE, ".wh.back", "", b""),
            (DIR, "back", "", b""),
            (FILE, "kept", "", b"new"),
            (FILE, ".wh.kept", "", b""),
            (DIR, "dir", "", b""),
            (FILE, ".wh.dir", "", b""),
        ]))
        .unwrap();
    assert!(is_whiteout(&arena.path("etc/gone")));
    assert!(is_opaque(&arena.path("opaque")) && is_opaque(&arena.path("back")));
    assert!(is_opaque(&arena.path("dir")) && !is_opaque(&arena.path("etc")));
    assert_eq!(fs::read_to_string(arena.path("kept")).unwrap(), "new");
    assert!(!arena.path(".wh..wh.plnk").exists());
}

#[test]
fn duplicate_names_keep_the_last() {
    if !root() {
        return;
    }
    let arena = Arena::new();
    arena
        .unpack(&archive(&[
            (DIR, "x", "", b""),
            (FILE, "x/deep/er", "", b"1"),
            (FILE, "x", "", b"2"),
            (SYM, "y", "x", b""),
            (DIR, "y", "", b""),
            (FILE, "y/z", "", b"3"),
        ]))
        .unwrap();
    assert_eq!(fs::read_to_string(arena.path("x")).unwrap(), "2");
    assert_eq!(fs::read_to_string(arena.path("y/z")).unwrap(), "3");
}

#[test]
fn bounds_hold_on_entries_bytes_names_and_headers() {
    if !root() {
        return;
    }
    let many: Vec<String> = (0..1001).map(|i| format!("f{i}")).collect();
    let many: Vec<Spec<'_>> = many
        .iter()
        .map(|n| (FILE, n.as_str(), "", b"".as_slice()))
        .collect();
    assert!(matches!(
        Arena::new().unpack(&archive(&many)),
        Err(ExtractError::Limit(_))
    ));
    // A size that is only claimed is refused before anything is written.
    let mut header = Header::new_gnu();
    header.set_path("big").unwrap();
    header.set_size(1 << 40);
    header.set_mode(0o644);
    header.set_cksum();
    let error = Arena::new().unpack(header.as_bytes()).unwrap_err();
    assert!(matches!(error, ExtractError::Limit(_)), "{error}");
    // A long name of 64 MiB of zeros must not be read into memory.
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(64 << 20);
    header.set_cksum();
    let bytes = header.as_bytes().as_slice().chain(io::repeat(b'a'));
    let arena = Arena::new();
    let error = extract(bytes, &arena.path(""), &OPTIONS).unwrap_err();
    assert!(error.to_string().contains("1 MiB"), "{error}");
    let mut builder = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o644);
    builder
        .append_data(&mut header, "a/".repeat(300) + "f", io::empty())
        .unwrap();
    let error = Arena::new()
        .unpack(&builder.into_inner().unwrap())
        .unwrap_err();
    assert!(matches!(error, ExtractError::Refused { .. }), "{error}");
}

/// Entries from few names, so that they meet each other in every way.
fn entries() -> impl Strategy<Value = Vec<(u8, String, String, Vec<u8>)>> {
    let part = prop::sample::select(vec![
        "a",
        "b",
        "..",
        ".",
        "",
        "up",
        ".wh.a",
        ".wh..wh..opq",
        ".wh...",
    ]);
    let path = prop::collection::vec(part, 1..5).prop_map(|p| p.join("/"));
    let target = prop_oneof![
        path.clone(),
        Just("/".to_owned()),
        Just("../../secret".to_owned()),
        Just("..".to_owned()),
        Just("/proc/self/root/etc".to_owned()),
    ];
    let kind = prop::sample::select(b"0125346KLxg".to_vec());
    prop::collection::vec(
        (
            kind,
            path,
            target,
            prop::collection::vec(any::<u8>(), 0..20),
        ),
        1..12,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn nothing_escapes_whatever_the_order(entries in entries()) {
        if root() {
            let specs: Vec<Spec<'_>> = entries.iter()
                .map(|(k, n, l, d)| (EntryType::new(*k), n.as_str(), l.as_str(), d.as_slice())).collect();
            // Either way is fine: Arena asserts that nothing got out.
            let _ = Arena::new().unpack(&archive(&specs));
        }
    }

    #[test]
    fn flipped_bits_never_escape_or_panic(at in 0usize..4096, bit in 0u8..8) {
        if root() {
            let mut bytes = archive(&[(DIR, "d", "", b""), (FILE, "d/f", "", b"hello"),
                (SYM, "d/l", "../..", b""), (HARD, "d/h", "d/f", b"")]);
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let _ = Arena::new().unpack(&bytes);
        }
    }
}
