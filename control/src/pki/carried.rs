//! What of the control plane's files goes along with a backup: without the CA's key no node would trust the
//! restored one, without the tokens' key no pod could use its token. The rest is made again from these.

use std::path::Path;

use bytes::Bytes;

use super::file::{ensure_directory, read_if_there, write_atomic};
use super::{PRIVATE, PUBLIC, PkiError};

/// Names below `pki`, with the mode of each; a certificate after its key, as at its making.
const FILES: [(&str, u32); 3] = [
    ("ca.key", PRIVATE),
    ("ca.crt", PUBLIC),
    ("service-accounts.key", PRIVATE),
];

/// The files, as far as they are there.
pub fn carried_files(data_dir: &Path) -> Result<Vec<(&'static str, String)>, PkiError> {
    let mut files = Vec::new();
    for (name, _) in FILES {
        if let Some(text) = read_if_there(&data_dir.join("pki").join(name))? {
            files.push((name, text));
        }
    }
    Ok(files)
}

/// Whether a file that is there is another one than the backup's: another cluster's.
pub fn differing_file(
    data_dir: &Path,
    files: &[(String, Bytes)],
) -> Result<Option<&'static str>, PkiError> {
    for (name, _) in FILES {
        let carried = files.iter().find(|(carried, _)| carried == name);
        let there = read_if_there(&data_dir.join("pki").join(name))?;
        if let (Some((_, carried)), Some(there)) = (carried, there)
            && *carried != there.as_bytes()
        {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Writes those that are not there.
pub fn write_carried(data_dir: &Path, files: &[(String, Bytes)]) -> Result<(), PkiError> {
    let directory = data_dir.join("pki");
    ensure_directory(&directory)?;
    for (name, mode) in FILES {
        let path = directory.join(name);
        let carried = files.iter().find(|(carried, _)| carried == name);
        if let Some((_, content)) = carried
            && read_if_there(&path)?.is_none()
        {
            write_atomic(&path, content, mode)?;
        }
    }
    Ok(())
}
