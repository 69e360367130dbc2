//! Objects as the rows that people read: gantry-api has the columns, this has the clock.

use gantry_api::kinds::Kind;
use gantry_api::proto::{TableColumn, TableRow};
use gantry_api::status::Status;
use gantry_api::table;
use jiff::Timestamp;

use super::object;
use crate::store::Entry;

/// Renders the objects of one kind as one request wants them.
pub(super) struct Renderer {
    kind: &'static Kind,
    wide: bool,
    with_namespace: bool,
}

impl Renderer {
    pub(super) fn new(kind: &'static Kind, wide: bool, with_namespace: bool) -> Renderer {
        Renderer {
            kind,
            wide,
            with_namespace,
        }
    }

    pub(super) fn columns(&self) -> Vec<TableColumn> {
        table::columns(self.kind, self.wide, self.with_namespace)
    }

    /// The row of one entry, with its age as of now.
    pub(super) fn row(&self, entry: &Entry) -> Result<TableRow, Status> {
        let value = object::to_value(entry)?;
        let now = Timestamp::now();
        Ok(table::row(
            self.kind,
            &value,
            now,
            self.wide,
            self.with_namespace,
        ))
    }
}
