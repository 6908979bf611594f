//! Helpers of both macros.

use convert_case::{Case, Casing};
use proc_macro2::TokenStream;
use quote::ToTokens;
use syn::ext::IdentExt;
use syn::meta::ParseNestedMeta;
use syn::punctuated::Punctuated;
use syn::{
    Data, DeriveInput, Error, Field, Fields, GenericArgument, Generics, Ident, LitStr, Path, PathArguments,
    Result, Token, Type, parse_quote,
};

/// The named fields of a struct; anything else is an error at the word that makes it something else.
pub(crate) fn named_fields<'a>(
    input: &'a DeriveInput,
    derive: &str,
) -> Result<&'a Punctuated<Field, Token![,]>> {
    let wrong = |tokens: &dyn ToTokens, what: &str| {
        Err(Error::new_spanned(
            tokens.to_token_stream(),
            format!("{derive} works on structs with named fields, not on {what}"),
        ))
    };
    match &input.data {
        Data::Struct(data) => match &data.fields {
            Fields::Named(fields) => Ok(&fields.named),
            Fields::Unnamed(fields) => wrong(fields, "tuple structs"),
            Fields::Unit => wrong(&input.ident, "unit structs"),
        },
        Data::Enum(data) => wrong(&data.enum_token, "enums"),
        Data::Union(data) => wrong(&data.union_token, "unions"),
    }
}

/// The name of a field or struct in kebab-case, without the `r#` of a raw name.
pub(crate) fn kebab(ident: &Ident) -> LitStr {
    LitStr::new(&ident.unraw().to_string().to_case(Case::Kebab), ident.span())
}

/// Default path of the `kuasar_common` crate, unless an attribute names another.
pub(crate) fn default_crate() -> Path {
    parse_quote!(::kuasar_common)
}

/// Refuses an attribute where it has no meaning.
pub(crate) fn refuse_attribute(attributes: &[syn::Attribute], name: &str, advice: &str) -> Result<()> {
    match attributes.iter().find(|a| a.path().is_ident(name)) {
        Some(attribute) => Err(Error::new_spanned(attribute.path(), advice)),
        None => Ok(()),
    }
}

/// Stores an item's value; the second time it is an error.
pub(crate) fn set<T>(slot: &mut Option<T>, meta: &ParseNestedMeta<'_>, value: T) -> Result<()> {
    if slot.is_some() {
        return Err(meta.error("given twice"));
    }
    *slot = Some(value);
    Ok(())
}

/// Reads `= "text"`.
pub(crate) fn text(meta: &ParseNestedMeta<'_>) -> Result<LitStr> {
    meta.value()?.parse()
}

/// Reads `= "text"` that names something, so that it cannot be empty.
pub(crate) fn name(meta: &ParseNestedMeta<'_>) -> Result<LitStr> {
    let name = text(meta)?;
    if name.value().is_empty() { Err(Error::new_spanned(&name, "must not be empty")) } else { Ok(name) }
}

/// The type inside `outer<...>`, when `ty` is one: `Option<T>` gives `T`, however its path is written.
pub(crate) fn inside<'a>(ty: &'a Type, outer: &str) -> Option<&'a Type> {
    let Type::Path(path) = bare(ty) else { return None };
    let segment = path.path.segments.last().filter(|s| s.ident == outer)?;
    let PathArguments::AngleBracketed(arguments) = &segment.arguments else { return None };
    match arguments.args.first() {
        Some(GenericArgument::Type(inner)) if arguments.args.len() == 1 => Some(inner),
        _ => None,
    }
}

/// A type without the invisible groups that a declarative macro puts around it.
pub(crate) fn bare(ty: &Type) -> &Type {
    match ty {
        Type::Group(group) => bare(&group.elem),
        Type::Paren(paren) => bare(&paren.elem),
        _ => ty,
    }
}

/// Adds `type: bound` for every type given that mentions a type parameter of the struct. Others need no
/// bound: the compiler sees whether they fulfil it, and says so where the field is.
pub(crate) fn bound(generics: &Generics, types: &[&Type], bound: &TokenStream) -> Generics {
    let mut generics = generics.clone();
    let parameters: Vec<Ident> = generics.type_params().map(|p| p.ident.clone()).collect();
    for ty in types {
        if mentions(ty.to_token_stream(), &parameters) {
            generics.make_where_clause().predicates.push(parse_quote!(#ty: #bound));
        }
    }
    generics
}

fn mentions(tokens: TokenStream, names: &[Ident]) -> bool {
    tokens.into_iter().any(|token| match token {
        proc_macro2::TokenTree::Ident(ident) => names.contains(&ident),
        proc_macro2::TokenTree::Group(group) => mentions(group.stream(), names),
        proc_macro2::TokenTree::Punct(_) | proc_macro2::TokenTree::Literal(_) => false,
    })
}
