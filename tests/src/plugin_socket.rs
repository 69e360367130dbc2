//! Sockets of the tests' own plugins.

use std::path::Path;

use anyhow::{Context, Result};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

/// Listens at a socket, in place of what an earlier plugin has left there.
pub(crate) fn listen(socket: &Path) -> Result<UnixListenerStream> {
    let directory = socket.parent().context("a socket lies in a directory")?;
    std::fs::create_dir_all(directory)?;
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
    Ok(UnixListenerStream::new(listener))
}
