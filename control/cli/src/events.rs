//! `gantry events`: what happened, oldest first.

use crate::Global;
use crate::connection::{Session, key, parse};
use crate::failure::Failure;
use crate::names;
use crate::output::{self, Format};
use clap::Args;
use gantry_api::kinds::{Kind, resolve};
use gantry_api::proto::{ListRequest, WatchRequest, watch_event};
use gantry_api::table;
use jiff::Timestamp;
use serde_json::Value;
use tokio_stream::StreamExt as _;

#[derive(Args, Debug)]
pub(crate) struct Events {
    /// All namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Only events about this object: pod/web
    #[arg(long = "for")]
    about: Option<String>,
    /// Only these types: Normal,Warning
    #[arg(long, value_delimiter = ',')]
    types: Vec<String>,
    /// Then watch for new ones
    #[arg(short, long)]
    watch: bool,
    /// No header line
    #[arg(long)]
    no_headers: bool,
    /// json, yaml or wide
    #[arg(short, long, default_value = "", hide_default_value = true, value_parser = output::format)]
    output: Format,
}

/// The kind of events, which is in the table for sure; an error only if that changes.
pub(crate) fn event_kind() -> Result<&'static Kind, Failure> {
    resolve("events").ok_or_else(|| Failure::local("this build does not know events"))
}

/// Events about one object, oldest first.
pub(crate) async fn about(
    session: &Session,
    kind: &Kind,
    object: &Value,
) -> Result<Vec<Value>, Failure> {
    let field = |name: &str| {
        let value = object
            .pointer(&format!("/metadata/{name}"))
            .and_then(Value::as_str);
        value.unwrap_or_default().to_owned()
    };
    let namespace = if kind.namespaced {
        field("namespace")
    } else {
        String::new()
    };
    let mut selector = format!(
        "involvedObject.name={},involvedObject.kind={}",
        field("name"),
        kind.kind
    );
    // Events about nodes carry the node's name as uid, as the kubelet does it.
    // Those about a static pod carry the UID that its node gave it.
    let mirrored = object
        .pointer("/metadata/annotations/kubernetes.io~1config.mirror")
        .and_then(Value::as_str);
    let uid = mirrored.map_or_else(|| field("uid"), str::to_owned);
    if kind.namespaced && !uid.is_empty() {
        selector.push_str(&format!(",involvedObject.uid={uid}"));
    }
    let request = ListRequest {
        key: Some(key(event_kind()?, &namespace, "")),
        field_selector: selector,
        ..ListRequest::default()
    };
    let (mut events, _) = session.list(request).await?;
    sort(&mut events);
    Ok(events)
}

fn sort(events: &mut [Value]) {
    events.sort_by_key(|event| table::event_times(event).1);
}

impl Events {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let kind = event_kind()?;
        let mut field_selector = String::new();
        if let Some(about) = &self.about {
            let (kind, name) = names::one(std::slice::from_ref(about), None)?;
            field_selector = format!(
                "involvedObject.kind={},involvedObject.name={name}",
                kind.kind
            );
        }
        let session = Session::open(global).await?;
        let namespace = if self.all_namespaces {
            ""
        } else {
            session.namespace.as_str()
        };
        let request = ListRequest {
            key: Some(key(kind, namespace, "")),
            field_selector: field_selector.clone(),
            ..ListRequest::default()
        };
        let (mut events, revision) = session.list(request).await?;
        events.retain(|event| self.wanted(event));
        sort(&mut events);
        if matches!(self.output, Format::Yaml | Format::Json) {
            return output::print_value(&output::list(events), self.output);
        }
        if events.is_empty() && !self.watch {
            if self.all_namespaces {
                eprintln!("No events found.");
            } else {
                eprintln!("No events found in {} namespace.", session.namespace);
            }
            return Ok(());
        }
        let header = || -> Vec<String> {
            let columns = table::columns(kind, self.wide(), self.all_namespaces);
            columns.into_iter().map(|c| c.name).collect()
        };
        let mut rows = if self.no_headers {
            Vec::new()
        } else {
            vec![header()]
        };
        rows.extend(events.iter().map(|event| self.row(kind, event)));
        output::print(&output::table_text(&rows, &[]))?;
        if !self.watch {
            return Ok(());
        }
        let widths = table::widths(rows.iter().map(Vec::as_slice));
        let request = WatchRequest {
            key: Some(key(kind, namespace, "")),
            field_selector,
            resource_version: revision,
            ..WatchRequest::default()
        };
        let mut stream = session.objects.clone().watch(request).await?.into_inner();
        while let Some(event) = stream.next().await {
            let event = event?;
            let new = matches!(
                event.r#type(),
                watch_event::Type::Added | watch_event::Type::Modified
            );
            if !new || event.json.is_empty() {
                continue;
            }
            let event = parse(&event.json)?;
            if self.wanted(&event) {
                output::print(&output::table_text(&[self.row(kind, &event)], &widths))?;
            }
        }
        Ok(())
    }

    fn wide(&self) -> bool {
        self.output == Format::Wide
    }

    fn wanted(&self, event: &Value) -> bool {
        let own = event
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        self.types.is_empty() || self.types.iter().any(|t| t.eq_ignore_ascii_case(own))
    }

    fn row(&self, kind: &Kind, event: &Value) -> Vec<String> {
        table::row(
            kind,
            event,
            Timestamp::now(),
            self.wide(),
            self.all_namespaces,
        )
        .cells
    }
}
