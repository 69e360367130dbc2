//! Finds the container's program the way a shell does and says why not in Kubernetes' words
//! (those of runc, which are Go's `exec.LookPath`).

use std::ffi::CString;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};

use crate::report::EXEC_ERROR;

/// The path to execute for `name`, seen from inside the container, by the container's own user.
pub(crate) fn resolve(name: &str, search_path: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        return check(Path::new(name))
            .map(|()| PathBuf::from(name))
            .map_err(|why| error(name, &why));
    }
    if name.is_empty() {
        return Err(error(name, "executable file not found in $PATH"));
    }
    let mut denied = false;
    for directory in search_path.split(':') {
        // An empty entry is the working directory; Go and runc refuse to find anything there.
        if directory.is_empty() {
            continue;
        }
        let candidate = Path::new(directory).join(name);
        match check(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(why) => denied |= why == "permission denied",
        }
    }
    let why = if denied {
        "permission denied"
    } else {
        "executable file not found in $PATH"
    };
    Err(error(name, why))
}

fn error(name: &str, why: &str) -> String {
    // `exec: "name": why`
    format!("{EXEC_ERROR}{name}\": {why}")
}

fn check(path: &Path) -> Result<(), String> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err("is a directory".into()),
        Ok(_) => {}
        Err(error) => {
            let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
            let why = errno.desc().to_lowercase();
            return Err(format!("stat {}: {why}", path.display()));
        }
    }
    faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS)
        .map_err(|errno| errno.desc().to_lowercase())
}

/// argv as execve takes it.
pub(crate) fn c_strings(words: &[String]) -> Result<Vec<CString>, String> {
    words
        .iter()
        .map(|word| CString::new(word.as_str()).map_err(|_| error(word, "invalid argument")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::resolve;

    #[test]
    fn programs_are_found_or_missed_in_kubernetes_words() {
        assert_eq!(
            resolve("sh", "/nowhere:/bin").unwrap().to_str(),
            Some("/bin/sh")
        );
        assert_eq!(resolve("/bin/sh", "").unwrap().to_str(), Some("/bin/sh"));
        for (name, wanted) in [
            (
                "/bin/nope",
                r#"exec: "/bin/nope": stat /bin/nope: no such file or directory"#,
            ),
            (
                "nope",
                r#"exec: "nope": executable file not found in $PATH"#,
            ),
            ("", r#"exec: "": executable file not found in $PATH"#),
            ("/etc", r#"exec: "/etc": is a directory"#),
            ("/etc/passwd", r#"exec: "/etc/passwd": permission denied"#),
        ] {
            assert_eq!(resolve(name, "/bin:/usr/bin").unwrap_err(), wanted);
        }
    }
}
