//! Things found by the labels that their selectors mean, without asking each selector.
//!
//! A selector that demands one certain label is filed under it; the few others are asked always. So
//! a pod with four labels looks into four drawers, however many selectors there are.

use std::collections::{BTreeMap, BTreeSet};

use gantry_api::selector::Selector;

use super::facts::Labels;

/// See the module.
pub(super) struct BySelector<T> {
    by_label: BTreeMap<(String, String), BTreeSet<T>>,
    others: BTreeSet<T>,
}

impl<T> Default for BySelector<T> {
    fn default() -> Self {
        Self {
            by_label: BTreeMap::new(),
            others: BTreeSet::new(),
        }
    }
}

impl<T: Ord + Clone> BySelector<T> {
    pub(super) fn insert(&mut self, selector: &Selector, thing: T) {
        match selector.certain_label() {
            Some((key, value)) => {
                let label = (key.to_owned(), value.to_owned());
                self.by_label.entry(label).or_default().insert(thing);
            }
            None => {
                self.others.insert(thing);
            }
        }
    }

    /// Takes back an [`BySelector::insert`] with the same selector.
    pub(super) fn remove(&mut self, selector: &Selector, thing: &T) {
        match selector.certain_label() {
            Some((key, value)) => {
                let label = (key.to_owned(), value.to_owned());
                if let Some(things) = self.by_label.get_mut(&label) {
                    things.remove(thing);
                    if things.is_empty() {
                        self.by_label.remove(&label);
                    }
                }
            }
            None => {
                self.others.remove(thing);
            }
        }
    }

    /// All whose selector may mean an object with these labels: each is still to be asked.
    pub(super) fn candidates(&self, labels: &Labels) -> impl Iterator<Item = &T> {
        let filed = labels
            .iter()
            .filter_map(|(key, value)| self.by_label.get(&(key.clone(), value.clone())));
        filed.flatten().chain(&self.others)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_label.is_empty() && self.others.is_empty()
    }
}
