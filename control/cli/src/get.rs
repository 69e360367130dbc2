//! `gantry get`: objects as tables, YAML, JSON or names; `-w` goes on with what changes.

use crate::Global;
use crate::connection::{Session, key};
use crate::failure::Failure;
use crate::names::{Target, targets};
use crate::output::{self, Format};
use clap::Args;
use gantry_api::kinds::Kind;
use gantry_api::proto::{ListRequest, TableReply, TableRow, WatchRequest, watch_event};
use gantry_api::table::labels_text;
use serde_json::Value;
use std::collections::BTreeMap;
use tokio_stream::StreamExt as _;

#[derive(Args, Debug)]
pub(crate) struct Get {
    /// Types and names: pods, po,svc, pod/web, deploy web, all
    #[arg(required = true, value_name = "TYPE|TYPE/NAME")]
    words: Vec<String>,
    /// All namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// json, yaml, name or wide
    #[arg(short, long, default_value = "", hide_default_value = true, value_parser = output::format)]
    output: Format,
    /// Label selector: app=web,tier!=db
    #[arg(short = 'l', long, default_value = "", hide_default_value = true)]
    selector: String,
    /// Field selector: status.phase=Running
    #[arg(long, default_value = "", hide_default_value = true)]
    field_selector: String,
    /// Then watch for changes
    #[arg(short, long)]
    watch: bool,
    /// Watch for changes without listing first
    #[arg(long)]
    watch_only: bool,
    /// No header line
    #[arg(long)]
    no_headers: bool,
    /// Show labels in a last column
    #[arg(long)]
    show_labels: bool,
    /// Sort by a field: .metadata.creationTimestamp
    #[arg(long)]
    sort_by: Option<String>,
    /// No failure when a named object does not exist
    #[arg(long)]
    ignore_not_found: bool,
}

impl Get {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let targets = targets(&self.words)?;
        let watch = self.watch || self.watch_only;
        if watch && (targets.len() != 1 || targets[0].names.len() > 1) {
            return Err(Failure::local(
                "you may only watch a single resource or type at a time",
            ));
        }
        let named = targets.iter().any(|t| !t.names.is_empty());
        if named && self.all_namespaces {
            let text = "a resource cannot be retrieved by name across all namespaces";
            return Err(Failure::local(text));
        }
        if named && !(self.selector.is_empty() && self.field_selector.is_empty()) {
            return Err(Failure::local(
                "name cannot be provided when a selector is specified",
            ));
        }
        let session = Session::open(global).await?;
        match self.output {
            Format::Table | Format::Wide => self.tables(&session, &targets).await,
            _ => self.objects(&session, &targets).await,
        }
    }

    fn request(&self, session: &Session, kind: &Kind, name: &str) -> ListRequest {
        let namespace = if self.all_namespaces {
            ""
        } else {
            session.namespace.as_str()
        };
        ListRequest {
            key: Some(key(kind, namespace, name)),
            label_selector: self.selector.clone(),
            field_selector: self.field_selector.clone(),
            wide: self.output == Format::Wide,
            with_namespace: self.all_namespaces,
        }
    }

    // --- objects ------------------------------------------------------------------------------

    async fn objects(&self, session: &Session, targets: &[Target]) -> Result<(), Failure> {
        let mut items: Vec<(&'static Kind, Value)> = Vec::new();
        let mut failed = false;
        let mut revision = String::new();
        for target in targets {
            for name in &target.names {
                match session.get(session.key(target.kind, name)).await {
                    Ok(object) => {
                        object
                            .pointer("/metadata/resourceVersion")
                            .and_then(Value::as_str)
                            .unwrap_or_default()
                            .clone_into(&mut revision);
                        items.push((target.kind, output::with_type(target.kind, object)));
                    }
                    Err(failure) => failed |= self.note(failure)?,
                }
            }
            if target.names.is_empty() {
                let request = self.request(session, target.kind, "");
                let (objects, at) = session.list(request).await?;
                revision = at;
                let typed = |o| (target.kind, output::with_type(target.kind, o));
                items.extend(objects.into_iter().map(typed));
            }
        }
        if let Some(path) = &self.sort_by {
            let pointer = pointer(path);
            items.sort_by_cached_key(|(_, object)| sort_key(object, &pointer));
        }
        let one = targets.len() == 1 && targets[0].names.len() == 1;
        if !self.watch_only {
            self.print_objects(&items, one)?;
        }
        if self.watch || self.watch_only {
            let name = targets[0]
                .names
                .first()
                .map(String::as_str)
                .unwrap_or_default();
            self.watch_objects(session, targets[0].kind, name, revision)
                .await?;
        }
        if failed {
            Err(Failure::Reported)
        } else {
            Ok(())
        }
    }

    fn print_objects(&self, items: &[(&'static Kind, Value)], one: bool) -> Result<(), Failure> {
        if self.output == Format::Name {
            let line = |(kind, object): &(&'static Kind, Value)| {
                let name = object.pointer("/metadata/name").and_then(Value::as_str);
                format!("{}\n", output::object_name(kind, name.unwrap_or_default()))
            };
            return output::print(&items.iter().map(line).collect::<String>());
        }
        match items {
            [] if one => Ok(()),
            [(_, object)] if one => output::print_value(object, self.output),
            _ => {
                let objects = items.iter().map(|(_, object)| object.clone()).collect();
                output::print_value(&output::list(objects), self.output)
            }
        }
    }

    /// Reports a failure of one of several objects; true when it counts.
    fn note(&self, failure: Failure) -> Result<bool, Failure> {
        match failure.reason() {
            Some(gantry_api::status::Reason::NotFound) if self.ignore_not_found => Ok(false),
            Some(_) => {
                eprintln!("{failure}");
                Ok(true)
            }
            None => Err(failure),
        }
    }

    async fn watch_objects(
        &self,
        session: &Session,
        kind: &'static Kind,
        name: &str,
        revision: String,
    ) -> Result<(), Failure> {
        let mut stream = self
            .watch_stream(session, kind, name, revision, false)
            .await?;
        while let Some(event) = stream.next().await {
            let event = event?;
            if event.r#type() == watch_event::Type::Bookmark || event.json.is_empty() {
                continue;
            }
            let object = output::with_type(kind, crate::connection::parse(&event.json)?);
            if self.output == Format::Yaml {
                output::print("---\n")?;
            }
            self.print_objects(&[(kind, object)], true)?;
        }
        Ok(())
    }

    async fn watch_stream(
        &self,
        session: &Session,
        kind: &Kind,
        name: &str,
        revision: String,
        as_table: bool,
    ) -> Result<tonic::Streaming<gantry_api::proto::WatchEvent>, Failure> {
        let list = self.request(session, kind, "");
        let field_selector = if name.is_empty() {
            list.field_selector
        } else {
            format!("metadata.name={name}")
        };
        let request = WatchRequest {
            key: list.key,
            label_selector: list.label_selector,
            field_selector,
            resource_version: revision,
            as_table,
            wide: list.wide,
            with_namespace: list.with_namespace,
        };
        Ok(session.objects.clone().watch(request).await?.into_inner())
    }

    // --- tables -------------------------------------------------------------------------------

    async fn tables(&self, session: &Session, targets: &[Target]) -> Result<(), Failure> {
        let many = targets.len() > 1;
        let mut failed = false;
        let mut printed = 0;
        let mut empty = true;
        for target in targets {
            let Some(mut table) = self.table(session, target, &mut failed).await? else {
                continue;
            };
            self.sort(session, target.kind, &mut table).await?;
            let labels = self.labels(session, target.kind).await?;
            let mut rows = self.header(&table);
            rows.extend(
                table
                    .rows
                    .iter()
                    .map(|r| cells(r, target.kind, many, &labels)),
            );
            if many && table.rows.is_empty() {
                continue;
            }
            empty &= table.rows.is_empty();
            if !table.rows.is_empty() && !self.watch_only {
                if printed > 0 {
                    output::print("\n")?;
                }
                output::print(&output::table_text(&rows, &[]))?;
                printed += 1;
            }
            if self.watch || self.watch_only {
                let shown = printed > 0;
                return self.watch_rows(session, target, table, rows, shown).await;
            }
        }
        if failed {
            return Err(Failure::Reported);
        }
        let all_named = targets.iter().all(|t| !t.names.is_empty());
        if empty && !all_named {
            self.nothing(session, targets);
        }
        Ok(())
    }

    fn nothing(&self, session: &Session, targets: &[Target]) {
        if self.all_namespaces || targets.iter().all(|t| !t.kind.namespaced) {
            eprintln!("No resources found");
        } else {
            eprintln!("No resources found in {} namespace.", session.namespace);
        }
    }

    fn header(&self, table: &TableReply) -> Vec<Vec<String>> {
        if self.no_headers {
            return Vec::new();
        }
        let mut header: Vec<String> = table.columns.iter().map(|c| c.name.clone()).collect();
        if self.show_labels {
            header.push("LABELS".to_owned());
        }
        vec![header]
    }

    async fn table(
        &self,
        session: &Session,
        target: &Target,
        failed: &mut bool,
    ) -> Result<Option<TableReply>, Failure> {
        if target.names.is_empty() {
            return Ok(Some(
                session
                    .table(self.request(session, target.kind, ""))
                    .await?,
            ));
        }
        let mut whole: Option<TableReply> = None;
        for name in &target.names {
            match session
                .table(self.request(session, target.kind, name))
                .await
            {
                // No row: the server's own words say why.
                Ok(table) if table.rows.is_empty() => {
                    let missing = session.get(session.key(target.kind, name)).await;
                    if let Err(failure) = missing {
                        *failed |= self.note(failure)?;
                    }
                }
                Ok(table) => match &mut whole {
                    Some(whole) => whole.rows.extend(table.rows),
                    None => whole = Some(table),
                },
                Err(failure) => *failed |= self.note(failure)?,
            }
        }
        Ok(whole)
    }

    /// Labels by namespace and name; the server's rows carry none.
    async fn labels(
        &self,
        session: &Session,
        kind: &'static Kind,
    ) -> Result<Option<BTreeMap<(String, String), String>>, Failure> {
        if !self.show_labels {
            return Ok(None);
        }
        let (objects, _) = session.list(self.request(session, kind, "")).await?;
        let entry = |o: &Value| (identity(o), labels_text(o.pointer("/metadata/labels")));
        Ok(Some(objects.iter().map(entry).collect()))
    }

    async fn sort(
        &self,
        session: &Session,
        kind: &'static Kind,
        table: &mut TableReply,
    ) -> Result<(), Failure> {
        let Some(path) = &self.sort_by else {
            return Ok(());
        };
        let pointer = pointer(path);
        let (objects, _) = session.list(self.request(session, kind, "")).await?;
        let keys: BTreeMap<(String, String), SortKey> = objects
            .iter()
            .map(|o| (identity(o), sort_key(o, &pointer)))
            .collect();
        let key = |row: &TableRow| {
            keys.get(&(row.namespace.clone(), row.name.clone()))
                .cloned()
        };
        table.rows.sort_by_cached_key(key);
        Ok(())
    }

    async fn watch_rows(
        &self,
        session: &Session,
        target: &Target,
        table: TableReply,
        rows: Vec<Vec<String>>,
        mut header_shown: bool,
    ) -> Result<(), Failure> {
        let widths = gantry_api::table::widths(rows.iter().map(Vec::as_slice));
        let name = target.names.first().map(String::as_str).unwrap_or_default();
        let revision = table.resource_version.clone();
        let mut stream = self
            .watch_stream(session, target.kind, name, revision, true)
            .await?;
        while let Some(event) = stream.next().await {
            let Some(row) = event?.row else { continue };
            let mut lines = Vec::new();
            if !header_shown {
                lines.extend(self.header(&table));
                header_shown = true;
            }
            lines.push(cells(&row, target.kind, false, &None));
            output::print(&output::table_text(&lines, &widths))?;
        }
        Ok(())
    }
}

type Labels = Option<BTreeMap<(String, String), String>>;

/// A row's cells; with several kinds the name says which: `pod/web`.
fn cells(row: &TableRow, kind: &Kind, many: bool, labels: &Labels) -> Vec<String> {
    let mut cells = row.cells.clone();
    if many {
        // NAME is the first column, or the second behind NAMESPACE.
        if let Some(cell) = cells.iter_mut().take(2).find(|cell| **cell == row.name) {
            *cell = output::object_name(kind, &row.name);
        }
    }
    if let Some(labels) = labels {
        let own = labels.get(&(row.namespace.clone(), row.name.clone()));
        cells.push(own.cloned().unwrap_or_else(|| "<none>".to_owned()));
    }
    cells
}

fn identity(object: &Value) -> (String, String) {
    let field = |name: &str| {
        let value = object
            .pointer(&format!("/metadata/{name}"))
            .and_then(Value::as_str);
        value.unwrap_or_default().to_owned()
    };
    (field("namespace"), field("name"))
}

/// `.metadata.name`, `{.status.phase}` or `status.containerStatuses[0].restartCount` as a JSON
/// pointer.
fn pointer(path: &str) -> String {
    let path = path.trim_matches(|c| matches!(c, '{' | '}' | '\'' | '"'));
    path.split(['.', '[', ']'])
        .filter(|p| !p.is_empty())
        .map(|p| format!("/{p}"))
        .collect()
}

/// Numbers sort before texts and by value; absent fields first.
type SortKey = (u8, i64, String);

fn sort_key(object: &Value, pointer: &str) -> SortKey {
    match object.pointer(pointer) {
        None | Some(Value::Null) => (0, 0, String::new()),
        Some(Value::Number(n)) => (1, n.as_i64().unwrap_or(0), String::new()),
        Some(Value::String(s)) => (2, 0, s.clone()),
        Some(other) => (2, 0, other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sort_paths_are_read_as_kubectl_reads_them() {
        assert_eq!(pointer(".metadata.name"), "/metadata/name");
        assert_eq!(pointer("'{.status.list[0].x}'"), "/status/list/0/x");
        assert!(sort_key(&json!({"a": 2}), "/a") < sort_key(&json!({"a": 10}), "/a"));
        assert!(sort_key(&json!({}), "/a") < sort_key(&json!({"a": -1}), "/a"));
    }

    #[test]
    fn rows_of_several_kinds_say_their_kind() {
        let kind = gantry_api::kinds::resolve("deploy").unwrap();
        let row = TableRow {
            cells: vec!["shop".into(), "web".into(), "1/1".into()],
            namespace: "shop".into(),
            name: "web".into(),
        };
        assert_eq!(cells(&row, kind, true, &None)[1], "deployment.apps/web");
        assert_eq!(cells(&row, kind, false, &None)[1], "web");
    }
}
